//! What people read: stdout that may be closed, columns, amounts, times.

use std::io::{ErrorKind, Write};
use std::time::Duration;

use super::failure::Failure;

/// Writes to stdout. A reader that has seen enough (`| head`) is no error.
pub(super) fn say(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(e) => Err(Failure::new(format!("cannot write the result: {e}"))),
    }
}

/// Texts of a foreign program, made fit for a terminal: no control characters.
pub(super) fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Rows in columns as wide as they need; the first column to the left, amounts to the right.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([head[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let mut line = String::new();
        for (column, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let gap = " ".repeat(width.saturating_sub(cell.chars().count()));
            match column {
                0 => line.extend([cell, gap.as_str()]),
                _ => line.extend(["  ", gap.as_str(), cell]),
            }
        }
        line.trim_end().to_owned() + "\n"
    };
    rows.iter().fold(line(head.to_vec()), |text, row| {
        text + &line(row.iter().map(String::as_str).collect())
    })
}

/// `3 s`, `4 min 5 s`, `2 h 3 min`, `5 d 1 h`.
pub(super) fn duration(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..60 => format!("{s} s"),
        60..3_600 => format!("{} min {} s", s / 60, s % 60),
        3_600..86_400 => format!("{} h {} min", s / 3_600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3_600 % 24),
    }
}

/// `part` of `whole` as a percentage; nothing of nothing is 0.
pub(super) fn percent(part: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(part) * 100 / u128::from(whole.max(1))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![
            vec!["a".into(), "1 B".into()],
            vec!["longer".into(), "10.0 GiB".into()],
        ];
        assert_eq!(
            table(&["name", "size"], &rows),
            "name        size\na            1 B\nlonger  10.0 GiB\n"
        );
    }

    #[test]
    fn times_are_written_with_two_units() {
        for (s, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (61, "1 min 1 s"),
            (7_380, "2 h 3 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(duration(Duration::from_secs(s)), text);
        }
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(plain("a\x1b[31mb\n"), "a [31mb ");
    }
}

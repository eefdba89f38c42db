//! What the host's interfaces have carried, by the counters that the kernel keeps anyway.
//!
//! A program on each interface would cost every packet of the machine some 100 ns to say the same.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

/// Of the network namespace of this thread, which need not be that of the process.
const TOTALS: &str = "/proc/thread-self/net/dev";
const DEVICES: &str = "/sys/class/net";
/// In the table: bytes received, and bytes sent.
const RECEIVED_COLUMN: usize = 0;
const SENT_COLUMN: usize = 8;

/// What the interfaces have carried since they came up, headers of the link included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InterfaceTotals {
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
}

/// Which interfaces are the machine's way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interfaces {
    /// Empty: those with a device behind them, and where there are none, all but loopback.
    named: Vec<String>,
    last: BTreeMap<String, InterfaceTotals>,
    sum: InterfaceTotals,
}

impl Interfaces {
    /// Those called `named`; where none are, what looks like the machine's way out.
    pub fn new(named: Vec<String>) -> Self {
        Self {
            named,
            last: BTreeMap::new(),
            sum: InterfaceTotals::default(),
        }
    }

    /// What they have carried since the first reading. An interface that vanishes, comes anew or begins its
    /// count again takes nothing back.
    ///
    /// # Errors
    /// The kernel's table cannot be read.
    pub fn read(&mut self) -> io::Result<InterfaceTotals> {
        let table = fs::read_to_string(TOTALS)?;
        let has_device = |name: &str| Path::new(DEVICES).join(name).join("device").exists();
        Ok(self.take(&table, has_device))
    }

    /// Their speed in bytes a second, as their drivers say; nothing where one does not.
    pub fn speed(&self) -> Option<f64> {
        let mut mbit = 0.0;
        for name in self.last.keys() {
            let text = fs::read_to_string(Path::new(DEVICES).join(name).join("speed")).ok()?;
            // Virtual devices say -1.
            mbit += text.trim().parse::<f64>().ok().filter(|mbit| *mbit > 0.0)?;
        }
        (mbit > 0.0).then_some(mbit * 125_000.0)
    }

    fn take(&mut self, table: &str, has_device: impl Fn(&str) -> bool) -> InterfaceTotals {
        let all: BTreeMap<String, InterfaceTotals> = table.lines().filter_map(row).collect();
        let any_device = all.keys().any(|name| has_device(name));
        let is_chosen = |name: &str| match self.named.is_empty() {
            false => self.named.iter().any(|named| named == name),
            true if any_device => has_device(name),
            true => name != "lo",
        };
        let now: BTreeMap<_, _> = all
            .into_iter()
            .filter(|(name, _)| is_chosen(name))
            .collect();
        for (name, totals) in &now {
            if let Some(last) = self.last.get(name)
                && let Some(received) = totals.received_bytes.checked_sub(last.received_bytes)
                && let Some(sent) = totals.sent_bytes.checked_sub(last.sent_bytes)
            {
                self.sum.received_bytes = self.sum.received_bytes.saturating_add(received);
                self.sum.sent_bytes = self.sum.sent_bytes.saturating_add(sent);
            }
        }
        self.last = now;
        self.sum
    }
}

fn row(line: &str) -> Option<(String, InterfaceTotals)> {
    let (name, columns) = line.split_once(':')?;
    let columns: Vec<&str> = columns.split_whitespace().collect();
    Some((
        name.trim().to_owned(),
        InterfaceTotals {
            received_bytes: columns.get(RECEIVED_COLUMN)?.parse().ok()?,
            sent_bytes: columns.get(SENT_COLUMN)?.parse().ok()?,
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[(&str, u64, u64)]) -> String {
        let mut text = "Inter-|   Receive  |  Transmit\n face |bytes packets\n".to_owned();
        for (name, received, sent) in rows {
            text += &format!("{name:>6}: {received} 1 0 0 0 0 0 0 {sent} 1 0 0 0 0 0 0\n");
        }
        text
    }

    fn totals(received_bytes: u64, sent_bytes: u64) -> InterfaceTotals {
        InterfaceTotals {
            received_bytes,
            sent_bytes,
        }
    }

    #[test]
    fn devices_count_and_what_is_built_on_them_does_not() {
        let is_device = |name: &str| name.starts_with("eth");
        let mut interfaces = Interfaces::new(Vec::new());
        let first = table(&[("lo", 9, 9), ("eth0", 100, 50), ("cni0", 70, 70)]);
        assert_eq!(interfaces.take(&first, is_device), totals(0, 0));
        let second = table(&[("lo", 99, 99), ("eth0", 130, 90), ("cni0", 99, 99)]);
        assert_eq!(interfaces.take(&second, is_device), totals(30, 40));
    }

    #[test]
    fn an_interface_that_vanishes_or_begins_anew_takes_nothing_back() {
        let mut interfaces = Interfaces::new(vec!["a".into(), "b".into()]);
        let none = |_: &str| false;
        interfaces.take(&table(&[("a", 0, 0), ("b", 0, 0)]), none);
        let both = interfaces.take(&table(&[("a", 10, 10), ("b", 5, 5), ("c", 9, 9)]), none);
        assert_eq!(both, totals(15, 15));
        assert_eq!(
            interfaces.take(&table(&[("a", 20, 20)]), none),
            totals(25, 25)
        );
        let anew = interfaces.take(&table(&[("a", 3, 3), ("b", 7, 7)]), none);
        assert_eq!(anew, totals(25, 25));
        assert_eq!(
            interfaces.take(&table(&[("a", 4, 4), ("b", 9, 9)]), none),
            totals(28, 28)
        );
    }

    #[test]
    fn a_table_that_is_none_counts_nothing() {
        let mut interfaces = Interfaces::new(Vec::new());
        for text in ["", "eth0", "eth0: x", "eth0: 1 2 3", ":::"] {
            assert_eq!(interfaces.take(text, |_| true), totals(0, 0));
        }
    }
}

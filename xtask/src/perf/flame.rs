//! From the kernel's profiler to a flame graph.
//!
//! `perf script` is read as text: for each sample a line about it, then its frames from the leaf to the
//! root, then an empty line. Only programs that are measured are drawn, each process a tower of its own.

use std::collections::BTreeMap;
use std::fmt::Write;

const WIDTH: f64 = 1400.0;
const ROW_HEIGHT: usize = 16;
const HEAD_HEIGHT: usize = 44;
/// Narrower frames cannot be seen; their samples are in their parents.
const FRAME_WIDTH_MIN: f64 = 0.4;
/// A character at the font size used.
const CHARACTER_WIDTH: f64 = 6.6;
/// Deeper stacks are cut.
const DEPTH_MAX: usize = 120;

/// A frame and the samples in it and in what it called.
#[derive(Debug, Default)]
pub(super) struct Frame {
    samples: u64,
    callees: BTreeMap<String, Frame>,
}

impl Frame {
    fn add(&mut self, stack: &[String]) {
        self.samples += 1;
        if let Some((first, rest)) = stack.split_first() {
            self.callees.entry(first.clone()).or_default().add(rest);
        }
    }

    fn depth(&self) -> usize {
        self.callees
            .values()
            .map(|callee| 1 + callee.depth())
            .max()
            .unwrap_or(0)
    }

    /// All samples.
    pub(super) fn samples(&self) -> u64 {
        self.samples
    }

    /// The share of samples whose leaf each function is, the largest first.
    pub(super) fn leaves(&self) -> Vec<(String, f64)> {
        let mut own = BTreeMap::new();
        self.collect_leaves(&mut own);
        let whole = self.samples.max(1) as f64;
        let mut leaves: Vec<_> = own
            .into_iter()
            .map(|(name, samples)| (name, samples as f64 / whole))
            .collect();
        leaves.sort_by(|a: &(String, f64), b| b.1.total_cmp(&a.1));
        leaves
    }

    fn collect_leaves(&self, own: &mut BTreeMap<String, u64>) {
        for (name, frame) in &self.callees {
            let called: u64 = frame.callees.values().map(|callee| callee.samples).sum();
            if frame.samples > called {
                *own.entry(name.clone()).or_default() += frame.samples - called;
            }
            frame.collect_leaves(own);
        }
    }
}

/// Reads what `perf script -F comm,pid,tid,ip,sym,dso` prints; keeps what runs one of `programs`.
pub(super) fn read(script: impl Iterator<Item = String>, programs: &[&str]) -> Frame {
    let mut root = Frame::default();
    let mut process = String::new();
    let mut frames: Vec<(String, String)> = Vec::new();
    for line in script.chain([String::new()]) {
        if line.trim().is_empty() {
            add_sample(&mut root, &process, &frames, programs);
            frames.clear();
        } else if line.starts_with(char::is_whitespace) && !frames.is_empty()
            || line.starts_with('\t')
        {
            frames.extend(parse_frame(&line));
        } else {
            process = parse_process(&line).unwrap_or_default();
        }
    }
    root
}

/// `tokio-rt-worker 123/130 ...` → `123`
fn parse_process(line: &str) -> Option<String> {
    line.split_whitespace()
        .find_map(|word| word.split_once('/').map(|(pid, _)| pid))
        .filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()))
        .map(str::to_owned)
}

/// `  ffffffff81 name+0x1f (file)` → name and file
fn parse_frame(line: &str) -> Option<(String, String)> {
    let (_, rest) = line.trim().split_once(' ')?;
    let (symbol, file) = rest.rsplit_once(" (")?;
    let symbol = symbol.rsplit_once("+0x").map_or(symbol, |(name, _)| name);
    let file = file.trim_end_matches(')');
    let file = file.rsplit('/').next().unwrap_or(file);
    let name = if symbol == "[unknown]" {
        format!("[{file}]")
    } else {
        without_hash(symbol).to_owned()
    };
    Some((name, file.to_owned()))
}

/// Rust's legacy symbols end in a hash.
fn without_hash(symbol: &str) -> &str {
    match symbol.rsplit_once("::h") {
        Some((name, hash)) if hash.len() == 16 => name,
        _ => symbol,
    }
}

fn add_sample(root: &mut Frame, process: &str, frames: &[(String, String)], programs: &[&str]) {
    let program = frames
        .iter()
        .find_map(|(_, file)| programs.iter().find(|program| *program == file));
    let Some(program) = program else { return };
    let mut stack = vec![format!("{program} {process}")];
    stack.extend(frames.iter().rev().map(|(name, _)| name.clone()));
    stack.truncate(DEPTH_MAX);
    root.add(&stack);
}

/// The graph as a document, roots at the bottom; `place` says when and where it was measured.
pub(super) fn to_svg(root: &Frame, title: &str, place: &str) -> String {
    let height = HEAD_HEIGHT + (root.depth() + 1) * ROW_HEIGHT + 8;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"8\" y=\"18\" font-size=\"15\">{}</text>\n<text x=\"8\" y=\"34\" fill=\"#555\">{}; {} samples; point at a frame for its share</text>\n",
        escaped(title),
        escaped(place),
        root.samples,
    );
    let scale = WIDTH / root.samples.max(1) as f64;
    draw(
        &mut svg,
        root,
        root.samples,
        0.0,
        height - ROW_HEIGHT - 4,
        scale,
    );
    svg.push_str("</svg>\n");
    svg
}

fn draw(svg: &mut String, frame: &Frame, whole: u64, x: f64, y: usize, scale: f64) {
    let mut x = x;
    for (name, callee) in &frame.callees {
        let width = callee.samples as f64 * scale;
        if width >= FRAME_WIDTH_MIN {
            let share = callee.samples as f64 * 100.0 / whole.max(1) as f64;
            let shown: String = name
                .chars()
                .take((width / CHARACTER_WIDTH) as usize)
                .collect();
            // Writing to a string does not fail.
            let _ = writeln!(
                svg,
                "<g><title>{name}: {} samples, {share:.1} %</title><rect x=\"{x:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{}\">{}</text></g>",
                callee.samples,
                (width - 0.3).max(0.2),
                ROW_HEIGHT - 1,
                colour(name),
                x + 2.0,
                y + ROW_HEIGHT - 5,
                escaped(&shown),
                name = escaped(name),
            );
            draw(svg, callee, whole, x, y.saturating_sub(ROW_HEIGHT), scale);
        }
        x += width;
    }
}

/// Warm colours, the same for the same name.
fn colour(name: &str) -> String {
    let hash = name.bytes().fold(17_u32, |hash, byte| {
        hash.wrapping_mul(31).wrapping_add(byte.into())
    });
    format!(
        "rgb({},{},{})",
        205 + hash % 50,
        90 + (hash >> 8) % 130,
        40 + (hash >> 16) % 40
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "\
tokio-rt-worker   12/14
\tffffffff81 copy_page+0x1f ([kernel.kallsyms])
\t      401 quinn::send::h0123456789abcdef+0x5 (/srv/pantala-perf)
\t      400 main+0x1 (/srv/pantala-perf)

bash   9/9
\t      100 read+0x1 (/bin/bash)

main  12/12
\t      400 main+0x1 (/srv/pantala-perf)
";

    #[test]
    fn stacks_of_other_programs_are_left_out_and_leaves_are_counted() {
        let root = read(SCRIPT.lines().map(str::to_owned), &["pantala-perf"]);
        assert_eq!(root.samples(), 2);
        assert_eq!(
            root.leaves(),
            [("copy_page".to_owned(), 0.5), ("main".to_owned(), 0.5)]
        );
        let svg = to_svg(&root, "title", "place");
        assert!(svg.contains("pantala-perf 12: 2 samples, 100.0 %"));
        assert!(svg.contains("quinn::send: 1 samples, 50.0 %"));
    }
}

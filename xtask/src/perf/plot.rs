//! Bar charts as SVG.

use std::fmt::Write;

const WIDTH: usize = 860;
const LABEL_WIDTH: usize = 210;
const VALUE_WIDTH: usize = 90;
const BAR_HEIGHT: usize = 16;
const ROW_HEIGHT: usize = 22;
const HEAD_HEIGHT: usize = 64;
const GROUP_HEIGHT: usize = 28;
const FOOT_HEIGHT: usize = 28;
const COLOURS: [&str; 4] = ["#2a6f97", "#f4a259", "#8cb369", "#bc4b51"];

/// Horizontal bars, in groups; each bar may be made of several parts.
#[derive(Debug, Clone, Default)]
pub(super) struct Chart {
    /// What is shown.
    pub(super) title: String,
    /// What a length means.
    pub(super) unit: String,
    /// The names of the parts of each bar; empty where bars have one part.
    pub(super) parts: Vec<String>,
    /// The groups, in order.
    pub(super) groups: Vec<Group>,
}

/// Bars that belong together.
#[derive(Debug, Clone, Default)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) bars: Vec<Bar>,
}

/// One bar.
#[derive(Debug, Clone)]
pub(super) struct Bar {
    pub(super) name: String,
    /// The lengths of its parts.
    pub(super) values: Vec<f64>,
}

impl Bar {
    fn total(&self) -> f64 {
        self.values.iter().sum()
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

impl Chart {
    /// The chart as a document; `place` says when and where it was measured.
    pub(super) fn to_svg(&self, place: &str) -> String {
        let rows: usize = self.groups.iter().map(|group| group.bars.len()).sum();
        let height =
            HEAD_HEIGHT + self.groups.len() * GROUP_HEIGHT + rows * ROW_HEIGHT + FOOT_HEIGHT;
        let longest = self
            .groups
            .iter()
            .flat_map(|group| &group.bars)
            .map(Bar::total)
            .fold(f64::MIN_POSITIVE, f64::max);
        let scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) as f64 / longest;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let text = |svg: &mut String, x: usize, y: usize, style: &str, words: &str| {
            // Writing to a string does not fail.
            let _ = writeln!(
                svg,
                "<text x=\"{x}\" y=\"{y}\" {style}>{}</text>",
                escaped(words)
            );
        };
        text(
            &mut svg,
            12,
            22,
            "font-size=\"16\" font-weight=\"bold\"",
            &self.title,
        );
        text(&mut svg, 12, 40, "fill=\"#555\"", &self.unit);
        for (index, part) in self.parts.iter().enumerate() {
            let (x, y) = (LABEL_WIDTH + index * 140, HEAD_HEIGHT - 14);
            let colour = COLOURS[index % COLOURS.len()];
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>",
                y - 9
            );
            text(&mut svg, x + 16, y, "", part);
        }
        let mut y = HEAD_HEIGHT;
        for group in &self.groups {
            text(&mut svg, 12, y + 18, "font-weight=\"bold\"", &group.name);
            y += GROUP_HEIGHT;
            for bar in &group.bars {
                let baseline = y + BAR_HEIGHT - 3;
                text(
                    &mut svg,
                    LABEL_WIDTH - 8,
                    baseline,
                    "text-anchor=\"end\"",
                    &bar.name,
                );
                let mut x = LABEL_WIDTH as f64;
                for (index, value) in bar.values.iter().enumerate() {
                    let width = (value * scale).max(0.0);
                    let colour = COLOURS[index % COLOURS.len()];
                    let _ = writeln!(
                        svg,
                        "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>"
                    );
                    x += width;
                }
                let shown = format!("{:.3}", bar.total());
                text(&mut svg, x as usize + 6, baseline, "", &shown);
                y += ROW_HEIGHT;
            }
        }
        text(
            &mut svg,
            12,
            height - 10,
            "fill=\"#555\" font-size=\"11\"",
            place,
        );
        svg.push_str("</svg>\n");
        svg
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fills_the_chart_and_names_are_escaped() {
        let bar = |name: &str, values: &[f64]| Bar {
            name: name.into(),
            values: values.to_vec(),
        };
        let chart = Chart {
            title: "a < b & c".into(),
            unit: "s".into(),
            parts: vec!["one".into(), "two".into()],
            groups: vec![Group {
                name: "group".into(),
                bars: vec![bar("long", &[1.0, 3.0]), bar("short", &[0.0, 1.0])],
            }],
        };
        let svg = chart.to_svg("here");
        assert!(svg.contains("a &lt; b &amp; c"));
        // Three quarters, and one quarter, of the 560 that there are.
        assert!(svg.contains("width=\"420.0\"") && svg.contains("width=\"140.0\""));
        assert!(svg.contains(">here<"));
    }
}

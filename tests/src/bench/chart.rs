//! The chart: a drawing (SVG) of the table, readable on light and dark pages.
//!
//! Each line of the table is a row with a mark for each platform. Where there is a native figure the axis says how many
//! times as long the others take, in powers of two, so that equal factors are equal distances; starts, which have
//! none, are in seconds on an axis of their own.

use std::fmt::Write;

use super::figures::{Figures, LineFigures};
use super::lines::{self, Group};
use super::platform::Platform;

const WIDTH: f64 = 890.0;
const ROW: f64 = 20.0;
/// Where the axis begins and ends; names are to its left, numbers to its right.
const LEFT: f64 = 180.0;
const RIGHT: f64 = WIDTH - 130.0;

/// What both pages have.
const STYLE: &str = "\
text { font: 12px system-ui, 'Liberation Sans', Arial, sans-serif; }
.head { font-weight: bold; } .end { text-anchor: end; } .middle { text-anchor: middle; }
.native { stroke-width: 1.5; } .span { stroke-width: 3; } .qemu { stroke-width: 2; }
";

/// Colours of a page. They differ in brightness too, and the marks in shape, for those who see no colours.
struct Colours {
    page: &'static str,
    ink: &'static str,
    faint: &'static str,
    grid: &'static str,
    soft: &'static str,
    auto: &'static str,
    qemu: &'static str,
}

const LIGHT: Colours = Colours {
    page: "#ffffff",
    ink: "#1f2328",
    faint: "#636c76",
    grid: "#dde1e6",
    soft: "#0b63c5",
    auto: "#15803d",
    qemu: "#b45309",
};

const DARK: Colours = Colours {
    page: "#0d1117",
    ink: "#e6edf3",
    faint: "#9aa4af",
    grid: "#30363d",
    soft: "#6cb2ff",
    auto: "#4ade80",
    qemu: "#e3a04b",
};

impl Colours {
    /// As rules of a style sheet. Variables would be shorter, but not every program that draws SVG knows them.
    fn rules(&self) -> String {
        let Colours { page, ink, faint, grid, soft, auto, qemu } = self;
        format!(
            "text {{ fill: {ink}; }} .faint {{ fill: {faint}; }} .page {{ fill: {page}; }}\n\
             .grid, .span {{ stroke: {grid}; }} .native {{ stroke: {faint}; }}\n\
             .soft {{ fill: {soft}; }} .auto {{ fill: {auto}; }} .qemu {{ fill: {page}; stroke: {qemu}; }}\n"
        )
    }
}

/// The platforms that are marked, with their names for the reader, in the order in which marks cover each other.
const MARKED: [(Platform, &str); 3] = [
    (Platform::Qemu, "QEMU -icount"),
    (Platform::Soft, "Orrery, engine soft"),
    (Platform::Auto, "Orrery, engine auto"),
];

/// What a row's place on the axis means.
#[derive(Clone, Copy, PartialEq)]
enum Unit {
    /// Times as long as the native run.
    Native,
    /// Seconds.
    Seconds,
}

impl Unit {
    fn value(self, line: &LineFigures, platform: Platform) -> Option<f64> {
        match self {
            Unit::Native => line.ratio(platform, Platform::Native),
            Unit::Seconds => line.of(platform),
        }
    }

    fn text(self, value: f64) -> String {
        let digits = if value < 10.0 { 2 } else { 1 };
        match self {
            Unit::Native => format!("{value:.digits$}\u{d7}"),
            Unit::Seconds => format!("{value:.digits$} s"),
        }
    }
}

/// A logarithmic axis from one power of two to another.
struct Axis {
    unit: Unit,
    low: i32,
    high: i32,
}

impl Axis {
    fn of(unit: Unit, lines: &[&LineFigures]) -> Axis {
        let values =
            lines.iter().flat_map(|line| MARKED.iter().filter_map(|(platform, _)| unit.value(line, *platform)));
        // One is always on the axis: native speed, or a second.
        let (low, high) = values.fold((1.0, 1.0), |(low, high): (f64, f64), value| (low.min(value), high.max(value)));
        Axis { unit, low: low.log2().floor().max(-10.0) as i32, high: high.log2().ceil().clamp(1.0, 20.0) as i32 }
    }

    fn place(&self, value: f64) -> f64 {
        let (low, high) = (f64::from(self.low), f64::from(self.high));
        LEFT + (RIGHT - LEFT) * ((value.log2() - low) / (high - low)).clamp(0.0, 1.0)
    }

    fn tick(&self, power: i32) -> String {
        let number = if power < 0 { format!("1/{}", 1_u64 << -power) } else { (1_u64 << power).to_string() };
        if self.unit == Unit::Seconds { format!("{number} s") } else { number }
    }
}

/// The drawing of all lines that have figures.
pub fn chart(figures: &Figures, title: &str) -> String {
    let mut drawing = Drawing { text: String::new(), y: 0.0 };
    drawing.legend(figures, title);
    for unit in [Unit::Native, Unit::Seconds] {
        let is_shown = |line: &&LineFigures| {
            let has_unit = (unit == Unit::Native) == line.native_s.is_some();
            has_unit && MARKED.iter().any(|(platform, _)| line.of(*platform).is_some())
        };
        let lines: Vec<&LineFigures> = figures.lines.iter().filter(is_shown).collect();
        if !lines.is_empty() {
            drawing.panel(&Axis::of(unit, &lines), &lines);
        }
    }
    let height = drawing.y + ROW;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         role=\"img\">\n<title>{}</title>\n<style>\n{STYLE}{}\
         @media (prefers-color-scheme: dark) {{\n{}}}\n</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>\n{}</svg>\n",
        escape(title),
        LIGHT.rules(),
        DARK.rules(),
        drawing.text
    )
}

struct Drawing {
    text: String,
    y: f64,
}

impl Drawing {
    fn add(&mut self, element: std::fmt::Arguments) {
        writeln!(self.text, "{element}").expect("writing to memory does not fail");
    }

    fn words(&mut self, x: f64, y: f64, class: &str, words: &str) {
        let words = escape(words);
        self.add(format_args!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\">{words}</text>", y + 4.0));
    }

    fn legend(&mut self, figures: &Figures, title: &str) {
        self.y += ROW;
        self.words(20.0, self.y, "head", title);
        self.y += 1.4 * ROW;
        let has_figures = |platform| figures.lines.iter().any(|line| line.of(platform).is_some());
        let marked = MARKED.into_iter().filter(|(platform, _)| has_figures(*platform));
        for (place, (platform, name)) in marked.enumerate() {
            let x = 26.0 + 170.0 * place as f64;
            self.mark(platform, x, self.y);
            self.words(x + 12.0, self.y, "", name);
        }
        self.y += 0.6 * ROW;
    }

    /// Rows in groups over one axis.
    fn panel(&mut self, axis: &Axis, lines: &[&LineFigures]) {
        let words = match axis.unit {
            Unit::Native => "times as long as the native run; further left is faster",
            Unit::Seconds => "seconds; further left is faster",
        };
        self.y += 1.4 * ROW;
        self.words(LEFT, self.y, "faint", words);
        self.y += ROW;
        let top = self.y;
        let grid = self.text.len();
        for group in Group::ALL {
            let members: Vec<_> = lines.iter().filter(|line| lines::group(&line.name) == Some(group)).collect();
            if members.is_empty() {
                continue;
            }
            self.y += 1.2 * ROW;
            self.words(20.0, self.y, "head", group.title());
            for line in members {
                self.y += ROW;
                self.row(axis, line);
            }
        }
        self.y += 0.8 * ROW;
        let rows = self.text.split_off(grid);
        let has_figures = |platform: &Platform| lines.iter().any(|line| line.of(*platform).is_some());
        let orrery = [Platform::Soft, Platform::Auto].into_iter().filter(has_figures).map(Platform::name);
        self.words(RIGHT + 26.0, top, "faint", &orrery.collect::<Vec<_>>().join(", "));
        self.grid(axis, top);
        self.text += &rows;
    }

    /// Powers of two, from the top of a panel to where the drawing is now.
    fn grid(&mut self, axis: &Axis, top: f64) {
        for power in axis.low..=axis.high {
            let x = axis.place(f64::from(power).exp2());
            let class = if power == 0 && axis.unit == Unit::Native { "native" } else { "grid" };
            let (from, to) = (top + 10.0, self.y);
            self.add(format_args!(
                "<line class=\"{class}\" x1=\"{x:.1}\" y1=\"{from:.1}\" x2=\"{x:.1}\" y2=\"{to:.1}\"/>"
            ));
            self.words(x, top, "faint middle", &axis.tick(power));
        }
    }

    /// One line of the table: its name, a mark for each platform, and Orrery's figures as numbers.
    fn row(&mut self, axis: &Axis, line: &LineFigures) {
        let y = self.y;
        self.words(LEFT - 14.0, y, "end", &line.name);
        let marks: Vec<(Platform, f64)> =
            MARKED.iter().filter_map(|&(platform, _)| Some((platform, axis.unit.value(line, platform)?))).collect();
        let places = marks.iter().map(|&(_, value)| axis.place(value));
        let (first, last) = places.fold((RIGHT, LEFT), |(first, last), x| (first.min(x), last.max(x)));
        self.add(format_args!("<line class=\"span\" x1=\"{first:.1}\" y1=\"{y:.1}\" x2=\"{last:.1}\" y2=\"{y:.1}\"/>"));
        let mut numbers = Vec::new();
        for (platform, value) in marks {
            self.mark(platform, axis.place(value), y);
            if platform.is_orrery() {
                numbers.push(axis.unit.text(value));
            }
        }
        self.words(RIGHT + 26.0, y, "faint", &numbers.join(", "));
    }

    fn mark(&mut self, platform: Platform, x: f64, y: f64) {
        let class = platform.name();
        match platform {
            Platform::Auto => {
                let (left, right, top, bottom) = (x - 5.5, x + 5.5, y - 5.5, y + 5.5);
                let points = format!("{x:.1},{top:.1} {right:.1},{y:.1} {x:.1},{bottom:.1} {left:.1},{y:.1}");
                self.add(format_args!("<polygon class=\"{class}\" points=\"{points}\"/>"));
            }
            _ => self.add(format_args!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>")),
        }
    }
}

fn escape(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::Host;

    #[test]
    fn lines_with_figures_are_drawn() {
        let mut figures = Figures::new(&lines::select(&["go-".into(), "boot".into()]).unwrap(), Host::default());
        figures.add("go-fib", Platform::Native, 1.0, None);
        figures.add("go-fib", Platform::Qemu, 8.0, None);
        figures.add("go-fib", Platform::Soft, 2.0, None);
        figures.add("boot-cold", Platform::Soft, 0.5, None);
        let drawing = chart(&figures, "a < b");
        assert!(drawing.contains("<title>a &lt; b</title>"));
        assert!(drawing.contains(">2.00\u{d7}<") && drawing.contains(">0.50 s<"), "{drawing}");
        assert!(drawing.contains(">go-fib<") && !drawing.contains(">go-json<"), "{drawing}");
    }

    #[test]
    fn equal_factors_are_equal_distances() {
        let axis = Axis { unit: Unit::Native, low: -1, high: 3 };
        let places = [0.5, 1.0, 2.0, 4.0, 8.0].map(|value| axis.place(value));
        assert_eq!((places[0], places[4]), (LEFT, RIGHT));
        assert!(places.windows(2).all(|pair| (pair[1] - pair[0] - (RIGHT - LEFT) / 4.0).abs() < 1e-9));
    }
}

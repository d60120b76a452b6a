//! Pages that need nothing else: figures, bars and curves drawn as SVG, readable in the light and in the dark.
//!
//! Everything is appended to a string, which cannot fail. Texts are escaped here, numbers come as they are shown.

use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;\
background:#fff}h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td,th{padding:.2rem .8rem;\
text-align:right;border-bottom:1px solid #d8dee4}td:first-child,th:first-child{text-align:left}.figures{display:flex;gap:2rem;\
flex-wrap:wrap}.figure b{display:block;font-size:1.8rem}svg{max-width:100%;height:auto}\
svg text{font:12px system-ui,sans-serif;fill:#1b1f24}.grid{stroke:#d8dee4}.a{fill:#3b6fb6}\
pre,.text{background:#f3f5f7;padding:.8rem;overflow-x:auto}.text{white-space:pre-wrap}.bad{color:#b42318}\
.legend span{margin-right:1.2rem;white-space:nowrap}.legend i{display:inline-block;width:1.2rem;height:.25rem;margin-right:.35rem;\
vertical-align:middle}mark{background:#cfe3c8;color:inherit}.quiet{color:#6b737c}\
@media(prefers-color-scheme:dark){body{background:#14171a;color:#e6e9ec}svg text{fill:#e6e9ec}pre,.text{background:#20252a}\
td,th{border-color:#343a40}.grid{stroke:#343a40}mark{background:#2f5233}.quiet{color:#98a1aa}}";

/// Lines of a chart by their place; they read on white and on black.
const COLOURS: [&str; 8] = ["#3b6fb6", "#c4631f", "#3f8f4f", "#a24a9c", "#8a7a1c", "#22838c", "#c0394b", "#7a6bd0"];

/// The beginning of a page: its head and its title.
pub fn begin(title: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
    )
}

/// The figures that matter, large: what is shown, and what it is.
pub fn figures(page: &mut String, figures: &[(String, String)]) {
    page.push_str("<div class=\"figures\">");
    for (value, what) in figures {
        let _ = write!(page, "<div class=\"figure\"><b>{}</b>{}</div>", escape(value), escape(what));
    }
    page.push_str("</div>");
}

/// A heading and a line that says what stands below it.
pub fn section(page: &mut String, title: &str, what: &str) {
    let _ = write!(page, "<h2>{}</h2><p>{}</p>", escape(title), escape(what));
}

/// One bar: its label, its value, and what stands behind it.
pub struct Bar {
    /// What stands before it.
    pub label: String,
    /// Its length.
    pub value: f64,
    /// What stands behind it.
    pub shown: String,
}

impl Bar {
    /// A share between 0 and 1, shown in per cent.
    pub fn percent(label: String, share: f64) -> Self {
        Self { label, value: share, shown: format!("{:.1} %", 100.0 * share) }
    }
}

/// Horizontal bars up to `most`.
pub fn bars(page: &mut String, bars: impl Iterator<Item = Bar>, most: f64) {
    const LABEL: f64 = 160.0;
    const BAR: f64 = 420.0;
    const LINE: f64 = 24.0;
    let bars: Vec<Bar> = bars.collect();
    let _ = write!(
        page,
        "<svg width=\"{:.0}\" height=\"{:.0}\" role=\"img\">",
        LABEL + BAR + 110.0,
        LINE * bars.len() as f64 + 4.0
    );
    for (place, bar) in bars.iter().enumerate() {
        let top = LINE * place as f64;
        let width = if most > 0.0 { BAR * (bar.value / most).clamp(0.0, 1.0) } else { 0.0 };
        let _ = write!(
            page,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text><rect class=\"a\" x=\"{LABEL:.0}\" y=\"{:.0}\" \
             width=\"{width:.1}\" height=\"16\"/><text x=\"{:.0}\" y=\"{:.0}\">{}</text>",
            LABEL - 8.0,
            top + 15.0,
            escape(&bar.label),
            top + 3.0,
            LABEL + width + 6.0,
            top + 15.0,
            escape(&bar.shown),
        );
    }
    page.push_str("</svg>");
}

/// One line of a chart.
pub struct Line {
    /// What it shows.
    pub name: String,
    /// Its points, by the first number; what is not finite is left out.
    pub points: Vec<(f64, f64)>,
    /// Lines of one colour belong together.
    pub colour: usize,
    /// Whether it is drawn broken.
    pub is_dashed: bool,
}

/// Lines over one axis, which is called `below`, with a legend under them. Without a point nothing is drawn.
pub fn chart(page: &mut String, below: &str, lines: &[Line]) {
    const WIDTH: f64 = 760.0;
    const HEIGHT: f64 = 250.0;
    const LEFT: f64 = 64.0;
    const RIGHT: f64 = 16.0;
    const TOP: f64 = 10.0;
    const BOTTOM: f64 = 38.0;
    let finite = |line: &Line| -> Vec<(f64, f64)> {
        line.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let drawn: Vec<(&Line, Vec<(f64, f64)>)> =
        lines.iter().map(|line| (line, finite(line))).filter(|(_, points)| !points.is_empty()).collect();
    let all = || drawn.iter().flat_map(|(_, points)| points);
    if drawn.is_empty() {
        return;
    }
    let (x, y) = (Axis::over(all().map(|point| point.0)), Axis::over(all().map(|point| point.1)));
    let across = |value: f64| LEFT + x.share(value) * (WIDTH - LEFT - RIGHT);
    let up = |value: f64| HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM);
    let _ = write!(page, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" role=\"img\">");
    for tick in y.ticks() {
        let _ = write!(
            page,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            up(tick) + 4.0,
            y.shown(tick),
            at = up(tick),
        );
    }
    for tick in x.ticks() {
        let (at, text) = (across(tick), x.shown(tick));
        let _ = write!(page, "<text x=\"{at:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{text}</text>", HEIGHT - 20.0);
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    let _ = write!(
        page,
        "<text x=\"{middle:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>",
        HEIGHT - 4.0,
        escape(below)
    );
    for (line, points) in &drawn {
        let colour = COLOURS[line.colour % COLOURS.len()];
        let dashes = if line.is_dashed { " stroke-dasharray=\"5 4\"" } else { "" };
        if let [(at, value)] = points[..] {
            let _ =
                write!(page, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>", across(at), up(value));
            continue;
        }
        let _ = write!(page, "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\"{dashes} points=\"");
        for &(at, value) in points {
            let _ = write!(page, "{:.1},{:.1} ", across(at), up(value));
        }
        let _ = write!(page, "\"><title>{}</title></polyline>", escape(&line.name));
    }
    page.push_str("</svg><p class=\"legend\">");
    for (line, points) in &drawn {
        let colour = COLOURS[line.colour % COLOURS.len()];
        let paint = match line.is_dashed {
            true => format!("repeating-linear-gradient(90deg,{colour} 0 5px,transparent 5px 8px)"),
            false => colour.to_owned(),
        };
        let last = points.last().map_or(f64::NAN, |point| point.1);
        let _ = write!(
            page,
            "<span><i style=\"background:{paint}\"></i>{} <span class=\"quiet\">{}</span></span> ",
            escape(&line.name),
            short(last)
        );
    }
    page.push_str("</p>");
}

/// A PNG file in the page itself.
pub fn picture(page: &mut String, png: &[u8], what: &str) {
    let _ = write!(
        page,
        "<img style=\"image-rendering:pixelated;max-width:100%\" alt=\"{}\" src=\"data:image/png;base64,{}\">",
        escape(what),
        base64(png)
    );
}

/// Bytes as text (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |place: usize| u32::from(three.get(place).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for letter in 0..4 {
            let index = (bits >> (18 - 6 * letter)) & 63;
            text.push(if letter <= three.len() { char::from(LETTERS[index as usize]) } else { '=' });
        }
    }
    text
}

/// What one side of a chart goes over.
struct Axis {
    least: f64,
    most: f64,
    /// Between two ticks: 1, 2 or 5 times a power of ten.
    step: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (least, most) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| (least.min(value), most.max(value)));
        // A single value stands in the middle of a range of its own size.
        let half = if most > least { 0.0 } else { (most.abs() / 2.0).max(0.5) };
        let (least, most) = (least - half, most + half);
        let rough = (most - least) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = power * [1.0, 2.0, 5.0, 10.0].into_iter().find(|&times| times * power >= rough).unwrap_or(10.0);
        Self { least, most, step }
    }

    /// Where a value lies between the ends, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        (value - self.least) / (self.most - self.least)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        // Ends that are ticks stay so through a division's rounding.
        let first = (self.least / self.step - 1e-9).ceil() as i64;
        let last = (self.most / self.step + 1e-9).floor() as i64;
        (first..=last).map(|place| place as f64 * self.step)
    }

    /// With as many places as ticks differ in.
    fn shown(&self, tick: f64) -> String {
        if tick != 0.0 && (tick.abs() < 1e-3 || tick.abs() >= 1e6) {
            return format!("{tick:.1e}");
        }
        let places = (-self.step.log10().floor()).clamp(0.0, 6.0) as usize;
        format!("{tick:.places$}")
    }
}

/// A figure in four digits or so.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size == 0.0 || !size.is_finite() => format!("{value}"),
        size if !(1e-3..1e6).contains(&size) => format!("{value:.2e}"),
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

/// Text that stands for itself.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(values: &[f64]) -> Vec<String> {
        let axis = Axis::over(values.iter().copied());
        axis.ticks().map(|tick| axis.shown(tick)).collect()
    }

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(ticks(&[0.0, 1.0]), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(ticks(&[3.1, 11.2]), ["4", "6", "8", "10"]);
        assert_eq!(ticks(&[2.0]), ["1.0", "1.5", "2.0", "2.5", "3.0"]);
        assert_eq!(ticks(&[0.0]), ["-0.4", "-0.2", "0.0", "0.2", "0.4"]);
        assert_eq!(ticks(&[0.0, 3e-4]), ["0.0000", "1.0e-4", "2.0e-4", "3.0e-4"]);
    }

    #[test]
    fn what_is_not_finite_is_left_out_and_names_are_escaped() {
        let mut page = String::new();
        let line = |points: Vec<(f64, f64)>| Line { name: "a<b".to_owned(), points, colour: 9, is_dashed: true };
        chart(&mut page, "step", &[line(vec![(1.0, f64::NAN)])]);
        assert_eq!(page, "");
        chart(&mut page, "step", &[line(vec![(1.0, 2.0), (2.0, f64::INFINITY), (3.0, 4.0)])]);
        assert!(page.contains("a&lt;b") && !page.contains("a<b"));
        assert!(!page.contains("NaN") && !page.contains("inf"));
        assert_eq!(page.matches("<polyline").count(), 1);
    }

    /// The vectors of RFC 4648, section 10.
    #[test]
    fn bytes_become_text() {
        let texts = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(texts, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn figures_are_short() {
        let shown = [0.0, 0.12345, 12.345, 1234.5, 3e-5, 2.5e7, f64::NAN].map(short);
        assert_eq!(shown, ["0", "0.123", "12.3", "1234", "3.00e-5", "2.50e7", "NaN"]);
    }
}

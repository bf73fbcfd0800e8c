//! How the page looks: one style sheet for screen, phone, dark and paper.
//!
//! Colours are variables with a light and a dark value; the tests check every pair that carries a meaning for contrast
//! (WCAG 2.2: 4.5 for text, 3 for shapes) and the label colours for people who cannot tell red from green.

pub(super) const STYLE: &str = r#"
:root{
--bg:#fbfbfa;--surface:#ffffff;--ink:#1b2025;--soft:#57616b;--line:#d5d9de;--grid:#e6e8eb;--accent:#0b5c99;
--was:#6f7984;--was-fill:#c9cfd6;--right:#17684a;--wrong:#a8321a;--heat:#0b4f8a;--raw:#9dbbd4;--level:#86b3d8;--eval:#a34a00;
--pos:#00695c;--pos-on:#ffffff;--neu:#a9b6c9;--neu-on:#000000;--neg:#c8451b;--neg-on:#ffffff;
--notice:#fff4d6;--notice-ink:#5a4200;--notice-line:#d9a400}
@media screen and (prefers-color-scheme:dark){:root{
--bg:#14171a;--surface:#1b1f24;--ink:#e7eaed;--soft:#a6b0ba;--line:#3a424b;--grid:#2b3138;--accent:#6cb4ee;
--was:#98a3af;--was-fill:#48525d;--right:#63c9a0;--wrong:#f5937a;--heat:#86c5f7;--raw:#3f6d94;--level:#33658d;--eval:#f0a95b;
--pos:#45c9b2;--pos-on:#000000;--neu:#74849b;--neu-on:#000000;--neg:#f07f52;--neg-on:#000000;
--notice:#332a0d;--notice-ink:#f3dd9b;--notice-line:#a98300}}
.k-pos{--k:var(--pos);--on:var(--pos-on)}.k-neu{--k:var(--neu);--on:var(--neu-on)}.k-neg{--k:var(--neg);--on:var(--neg-on)}
.k-0{--k:#0072b2;--on:#ffffff}.k-1{--k:#e69f00;--on:#000000}.k-2{--k:#882255;--on:#ffffff}.k-3{--k:#56b4e9;--on:#000000}
.k-4{--k:#d55e00;--on:#000000}.k-5{--k:#999933;--on:#000000}.k-6{--k:#cc79a7;--on:#000000}.k-7{--k:#117733;--on:#ffffff}
.k-8{--k:#ddcc77;--on:#000000}.k-9{--k:#888888;--on:#000000}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
header,main,nav,footer{max-width:990px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .6rem}
h3{font-size:1rem;margin:0 0 .35rem}.kicker{color:var(--soft);font-size:.85rem;font-weight:400;margin:0}
p{margin:0 0 .8rem}
a{color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.skip{position:absolute;left:-999px}.skip:focus{left:8px;top:8px;background:var(--surface);padding:6px 12px;z-index:1}
.summary{font-size:1.13rem;line-height:1.5;max-width:46em}
.notice{background:var(--notice);color:var(--notice-ink);border-left:4px solid var(--notice-line);padding:.6rem 1rem;
margin-bottom:1.4rem;font-weight:600}
.facts{display:flex;flex-wrap:wrap;gap:.5rem 2rem;margin:1.2rem 0 0;padding:0}
.facts dt,.list dt{color:var(--soft);font-size:.82rem}.facts dd,.list dd{margin:0;overflow-wrap:anywhere}
.list{margin:0}.list>div{display:grid;grid-template-columns:minmax(9em,38%) 1fr;gap:.75rem;padding:.22rem 0;
border-bottom:1px solid var(--grid);align-items:baseline}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.15rem;margin:1.5rem 0 0;padding:.7rem 0;border:solid var(--line);
border-width:1px 0;font-size:.93rem}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
section{padding:2.4rem 0 0;scroll-margin-top:8px}
footer{color:var(--soft);font-size:.85rem;padding-top:3rem;padding-bottom:3rem}
.caption{color:var(--soft);max-width:50em;font-size:.95rem}
.soft{color:var(--soft);font-weight:400;font-size:.87rem}
.strong{font-weight:600;overflow-wrap:anywhere}
.prose{max-width:50em;padding-left:1.2rem}.prose li{margin-bottom:.5rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(205px,1fr));gap:14px;margin-bottom:1rem}
.tile{background:var(--surface);border:1px solid var(--line);border-radius:8px;padding:14px 16px 12px;display:flex;
flex-direction:column}
.tile h3{font-size:.93rem;color:var(--soft);font-weight:600;margin:0}
.tile p{margin:0}
.big{font-size:1.4rem;line-height:1.35;font-weight:650;letter-spacing:-.02em;white-space:nowrap}
.was{color:var(--soft);font-weight:450}.arrow{color:var(--soft);font-weight:400;padding:0 .1em}
.ends{display:flex;justify-content:space-between;color:var(--soft);font-size:.72rem;line-height:1.2}
.tile .interval{font-size:.85rem;margin:.5rem 0 .3rem;min-height:2.6em;line-height:1.35}
.explained{color:var(--soft);font-size:.8rem;line-height:1.35;}
.legend-row{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:.2rem 0 .9rem;font-size:.9rem}
.chip{display:inline-flex;align-items:center;gap:.4em;white-space:nowrap}
.swatch{display:inline-block;width:.8em;height:.8em;border-radius:2px;background:var(--k)}
.sign{display:inline-block;width:12px;height:12px;border:2px solid}.sign.round{border-radius:50%}
.sign.before{border-color:var(--was);background:var(--surface)}.sign.after{border-color:var(--accent);background:var(--accent)}
.sign.square{border-width:1px}.sign.square.before{background:var(--was-fill)}.sign.square.after{background:var(--level)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:1.6rem 2.2rem;margin:.4rem 0 1rem}
.pair>*{min-width:0}
figure{margin:0}
figcaption{font-weight:600;margin-bottom:.4rem;display:flex;flex-wrap:wrap;flex-direction:column}
svg{display:block;font-family:inherit;overflow:visible}
svg.fixed{width:100%;height:auto;max-width:430px}
svg.chart{width:100%;height:auto;margin:.6rem 0 1rem}
svg.narrow{display:none}
.tick,.legend{font-size:12px;fill:var(--soft)}.legend{fill:var(--ink);font-size:12.5px}.name{font-style:italic}
.value{font-size:12.5px;font-weight:600;fill:var(--ink)}
.number{font-size:16px;font-weight:600}.small{font-size:12px}
.grid{stroke:var(--grid);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.epoch{stroke:var(--soft);stroke-width:1;stroke-dasharray:1 4}
.baseline{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:2 3}
.ideal{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:6 4}
.curve{fill:none;stroke-linejoin:round;stroke-linecap:round;stroke-width:2}
.raw{stroke:var(--raw);stroke-width:1}.smooth{stroke:var(--accent);stroke-width:2.4}
.eval{stroke:var(--eval);stroke-dasharray:5 4}.eval-dot{fill:var(--eval)}.best{fill:none;stroke:var(--eval);stroke-width:1.6}
.plain{stroke:var(--accent);stroke-width:1.2}
text.halo{paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.heat{fill:var(--heat);stroke:none}.diagonal{stroke:var(--ink);stroke-width:1.5}
.on{fill:#000}.on.light-flip{fill:#fff}
@media screen and (prefers-color-scheme:dark){.on,.on.light-flip{fill:#fff}.on.dark-flip{fill:#000}}
.whisker{stroke-width:1.6}.whisker.before{stroke:var(--was)}.whisker.after{stroke:var(--accent)}
.whisker.over{stroke:var(--ink);stroke-width:1.4}
.point.before{fill:var(--surface);stroke:var(--was);stroke-width:2}.point.after{fill:var(--accent);stroke:var(--accent);stroke-width:2}
.span.before{fill:var(--was-fill)}.span.after{fill:var(--accent);fill-opacity:.32}
.column.before,.level.before{fill:var(--was-fill);stroke:var(--was);stroke-width:1}.column.after{fill:var(--accent)}
.level.after{fill:var(--level);stroke:var(--accent);stroke-width:1}
.piece{fill:var(--k);stroke:var(--surface);stroke-width:2}
.on-label{fill:var(--on);font-size:12.5px}.on-label.strong{font-weight:650}
.swatch,.sign,svg{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.tile svg.bar{width:calc(100% - 14px);margin:4px 7px 0}
.kinds{margin-bottom:1rem}
.kind{display:grid;grid-template-columns:150px 1fr 132px;gap:0 22px;align-items:center;padding:3px 0}
.kind p{margin:0}.kind-name{display:flex;flex-direction:column;line-height:1.25}.kind-value{white-space:nowrap;font-size:.93rem}
.cards{list-style:none;margin:0 0 1rem;padding:0}
.card{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,6fr);gap:6px 26px;padding:13px 0;border-top:1px solid var(--line);
break-inside:avoid}
.cards .card:last-child{border-bottom:1px solid var(--line)}
.tweet{margin:0 0 .3rem;overflow-wrap:anywhere;white-space:pre-line}
.tags{display:flex;flex-wrap:wrap;gap:.15rem .6rem;align-items:center;margin:0;font-size:.85rem;color:var(--soft)}
.note{border:1px solid var(--line);border-radius:9px;padding:0 .6em}
.answers{align-self:center}
.split table,.pair>div>.scroll>table{width:100%}
.answer{display:grid;grid-template-columns:3.4em minmax(0,1fr) 4.6em;gap:0 10px;align-items:center}
.answer.alone{grid-template-columns:minmax(0,1fr)}
.when{font-size:.82rem;color:var(--soft)}.mark{font-size:.87rem;white-space:nowrap}
.mark.right{color:var(--right)}.mark.wrong{color:var(--wrong);font-weight:650}
details{border-top:1px solid var(--grid);padding:.35rem 0}
summary{cursor:pointer;color:var(--accent);font-size:.93rem;padding:.2rem 0}
.scroll{overflow-x:auto;margin:.5rem 0 1rem;max-width:100%}
table{border-collapse:collapse;font-size:.88rem;line-height:1.4;min-width:50%}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--grid);vertical-align:top}
thead th{color:var(--soft);font-weight:600;border-bottom-color:var(--line);white-space:nowrap}
tbody th{font-weight:500}
.num{text-align:right;white-space:nowrap}
pre{overflow-x:auto;background:var(--surface);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;font-size:.86rem}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
@media screen and (max-width:680px){
header,main,nav,footer{padding-left:16px;padding-right:16px}
header{padding-top:22px}h1{font-size:1.5rem}.summary{font-size:1.05rem}
section{padding-top:2rem}
svg.wide{display:none}svg.narrow{display:block}
.tile .interval{min-height:0}
.kind{grid-template-columns:1fr auto;gap:2px 12px;padding:6px 0}
.kind .bar{grid-column:1/-1;grid-row:2}.kind-name{flex-direction:row;gap:.6em;align-items:baseline}
.card{grid-template-columns:minmax(0,1fr)}
.answers{align-self:auto}.answer{gap:0 8px;grid-template-columns:2.9em minmax(0,1fr) 4.1em}.answer.alone{grid-template-columns:minmax(0,1fr)}
.facts{display:grid;grid-template-columns:1fr 1fr;gap:.6rem 1rem}.facts>div:only-child{grid-column:1/-1}
.list>div{grid-template-columns:1fr 1fr}
table{font-size:.84rem}th,td{padding-right:.7rem}}
@media print{
body{background:#fff;font-size:10.5pt}nav,.skip{display:none}header{padding-top:0}
header,main,footer{max-width:none;padding-left:0;padding-right:0}
section{padding-top:1.2rem}h2,h3,.caption{break-after:avoid}
.tile,figure,.kind,.split,svg,tr{break-inside:avoid}
.pair{grid-template-columns:1fr 1fr}.tiles{grid-template-columns:repeat(4,1fr);gap:8px}.big{font-size:1.05rem}
.scroll{overflow:visible}pre{white-space:pre-wrap}
details:not(.long)::details-content{content-visibility:visible;height:auto}
a{color:inherit;text-decoration:none}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"#;

#[cfg(test)]
mod tests {
    use super::super::svg::confusion::{DARK_FLIPS, LIGHT_FLIPS, opacity};
    use super::STYLE;

    type Rgb = [f64; 3];

    /// The value of a variable in the light (first) or dark (second) block.
    fn color(name: &str, dark: bool) -> Rgb {
        let pattern = format!("--{name}:#");
        let at =
            STYLE.match_indices(&pattern).nth(usize::from(dark)).map(|(i, _)| i + pattern.len()).expect("a colour");
        hex(&STYLE[at..at + 6])
    }

    fn hex(digits: &str) -> Rgb {
        let byte = |i: usize| f64::from(u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).expect("hex")) / 255.0;
        [byte(0), byte(1), byte(2)]
    }

    fn linear(c: f64) -> f64 {
        if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
    }

    fn luminance(c: Rgb) -> f64 {
        0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2])
    }

    fn contrast(a: Rgb, b: Rgb) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    fn mix(over: Rgb, under: Rgb, opacity: f64) -> Rgb {
        std::array::from_fn(|i| over[i] * opacity + under[i] * (1.0 - opacity))
    }

    #[test]
    fn words_and_shapes_stand_out() {
        for dark in [false, true] {
            for under in ["bg", "surface"] {
                for (name, least) in [
                    ("ink", 7.0),
                    ("soft", 4.5),
                    ("accent", 4.5),
                    ("right", 4.5),
                    ("wrong", 4.5),
                    ("was", 3.0),
                    ("eval", 3.0),
                ] {
                    let found = contrast(color(name, dark), color(under, dark));
                    assert!(found >= least, "{name} on {under}, dark {dark}: {found:.2}");
                }
            }
            for label in ["pos", "neu", "neg", "notice"] {
                let ink = color(&format!("{label}-{}", if label == "notice" { "ink" } else { "on" }), dark);
                let found = contrast(ink, color(label, dark));
                assert!(found >= 4.5, "{label}, dark {dark}: {found:.2}");
            }
        }
        for (at, _) in STYLE.match_indices("{--k:#") {
            let (fill, ink) = (hex(&STYLE[at + 6..at + 12]), hex(&STYLE[at + 19..at + 25]));
            assert!(contrast(fill, ink) >= 4.5, "{} {:.2}", &STYLE[at..at + 26], contrast(fill, ink));
        }
    }

    #[test]
    fn numbers_in_a_confusion_matrix_can_be_read_at_every_shade() {
        for percent in 0..=100 {
            let strength = opacity(f64::from(percent) / 100.0);
            for (dark, flips) in [(false, LIGHT_FLIPS), (true, DARK_FLIPS)] {
                let cell = mix(color("heat", dark), color("bg", dark), strength);
                let ink = if (strength >= flips) ^ dark { [1.0; 3] } else { [0.0; 3] };
                let found = contrast(ink, cell);
                assert!(found >= 4.5, "{percent} %, dark {dark}: {found:.2}");
            }
        }
    }

    /// Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB.
    const DEFICIENCIES: [[[f64; 3]; 3]; 3] = [
        [[0.152_286, 1.052_583, -0.204_868], [0.114_503, 0.786_281, 0.099_216], [-0.003_882, -0.048_116, 1.051_998]],
        [[0.367_322, 0.860_646, -0.227_968], [0.280_085, 0.672_501, 0.047_413], [-0.011_820, 0.042_940, 0.968_881]],
        [[1.255_528, -0.076_749, -0.178_779], [-0.078_411, 0.930_809, 0.147_602], [0.004_733, 0.691_367, 0.303_900]],
    ];

    /// CIE L*a*b* (D65) of linear RGB.
    fn lab(c: Rgb) -> Rgb {
        let x = (0.4124 * c[0] + 0.3576 * c[1] + 0.1805 * c[2]) / 0.9505;
        let y = 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
        let z = (0.0193 * c[0] + 0.1192 * c[1] + 0.9505 * c[2]) / 1.089;
        let f = |t: f64| if t > 0.008_856 { t.cbrt() } else { 7.787 * t + 16.0 / 116.0 };
        [116.0 * f(y) - 16.0, 500.0 * (f(x) - f(y)), 200.0 * (f(y) - f(z))]
    }

    #[test]
    fn sentiments_differ_for_every_eye() {
        let pairs = [("pos", "neu"), ("neu", "neg"), ("pos", "neg")];
        for dark in [false, true] {
            for (a, b) in pairs {
                for (i, matrix) in DEFICIENCIES.iter().enumerate() {
                    let seen = |name: &str| {
                        let c = color(name, dark).map(linear);
                        lab(std::array::from_fn(|r| (0..3).map(|k| matrix[r][k] * c[k]).sum::<f64>().clamp(0.0, 1.0)))
                    };
                    let (a_seen, b_seen) = (seen(a), seen(b));
                    let distance = (0..3).map(|k| (a_seen[k] - b_seen[k]).powi(2)).sum::<f64>().sqrt();
                    assert!(distance > 20.0, "{a} and {b}, deficiency {i}, dark {dark}: {distance:.1}");
                }
            }
        }
    }

    #[test]
    fn the_style_asks_for_nothing_and_cannot_end_early() {
        for bad in ["url(", "@import", "http", "</", "<", "expression"] {
            assert!(!STYLE.contains(bad), "{bad}");
        }
        assert_eq!(STYLE.matches('{').count(), STYLE.matches('}').count());
    }
}

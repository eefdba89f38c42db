//! What is told of the samples: figures by name, ratios, a table and plots.

use super::network::NetworkKind;
use super::side::Pair;
use super::{Options, Sample, Samples, SinkKind, Stack};
use crate::perf::figures::{Figures, median};
use crate::perf::plot::{Bar, Chart, Group};

/// Ratios with a name of their own: each a stack on a network over another, by a quantity.
const RATIOS: &[(&str, Side, Side, Quantity)] = &[
    (
        "transfer_cpu_vs_quinn",
        (NetworkKind::Loopback1452, Stack::Ring),
        (NetworkKind::Loopback1452, Stack::Quinn),
        Quantity::Cpu,
    ),
    (
        "transfer_goodput_vs_quinn",
        (NetworkKind::Loopback1452, Stack::Ring),
        (NetworkKind::Loopback1452, Stack::Quinn),
        Quantity::Goodput,
    ),
    (
        "transfer_cpu_vs_rustls_tcp",
        (NetworkKind::Loopback1452, Stack::Ring),
        (NetworkKind::Loopback1452, Stack::TlsTcp),
        Quantity::Cpu,
    ),
    (
        "transfer_cpu_jumbo_vs_quinn",
        (NetworkKind::Loopback9000, Stack::Ring),
        (NetworkKind::Loopback1452, Stack::Quinn),
        Quantity::Cpu,
    ),
    (
        "transfer_cpu_veth9000_vs_rustls_tcp",
        (NetworkKind::Veth9000, Stack::Ring),
        (NetworkKind::Veth9000, Stack::TlsTcp),
        Quantity::Cpu,
    ),
    (
        "transfer_cpu_veth9000_whole_vs_rustls_tcp",
        (NetworkKind::Veth9000Whole, Stack::Ring),
        (NetworkKind::Veth9000Whole, Stack::TlsTcp),
        Quantity::Cpu,
    ),
];

type Side = (NetworkKind, Stack);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Quantity {
    Cpu,
    Goodput,
}

impl Quantity {
    fn of(self, sample: &Sample) -> f64 {
        match self {
            Self::Cpu => sample.server_cpu_s + sample.client_cpu_s,
            Self::Goodput => 1.0 / sample.seconds,
        }
    }
}

/// The median over the rounds of the ratio within each.
fn ratio(samples: &Samples, this: Side, that: Side, quantity: Quantity) -> Option<f64> {
    let (these, those) = (samples.get(&this)?, samples.get(&that)?);
    let ratios: Vec<f64> = these
        .iter()
        .zip(those)
        .map(|(this, that)| quantity.of(this) / quantity.of(that))
        .collect();
    (!ratios.is_empty()).then(|| median(&ratios))
}

fn gib(options: &Options) -> f64 {
    options.size as f64 / 1024.0
}

/// One line while it runs.
pub(super) fn print_sample(round: u32, options: &Options, pair: &Pair, sample: &Sample) {
    println!(
        "round {round}  {:<16}{:<10}{:>8.0} MiB/s{:>8.3} server{:>8.3} client CPU-s/GiB",
        pair.network.name(),
        pair.stack.name(),
        options.size as f64 / sample.seconds,
        sample.server_cpu_s / gib(options),
        sample.client_cpu_s / gib(options),
    );
}

/// Everything at the end.
pub(super) fn report(figures: &mut Figures, options: &Options, samples: &Samples) {
    let mut cpu = Chart {
        title: "One peer to another: processor time".into(),
        unit: "CPU-seconds per GiB, both sides, less is better".into(),
        parts: vec!["server".into(), "client".into()],
        groups: Vec::new(),
    };
    let mut goodput = Chart {
        title: "One peer to another: goodput".into(),
        unit: "MiB/s, more is better".into(),
        ..Chart::default()
    };
    for network in &options.networks {
        println!(
            "\n{:<18}{:>8}{:>9}{:>9}{:>9}{:>9}{:>9}{:>8}{:>8}{:>7}",
            network.name(),
            "MiB/s",
            "server",
            "client",
            "both",
            "/ quinn",
            "/ tls",
            "MiB srv",
            "MiB cl",
            "MTU"
        );
        let mut groups = [Group::default(), Group::default()];
        for group in &mut groups {
            group.name = network.name().into();
        }
        for stack in &options.stacks {
            let Some(of_stack) = samples.get(&(*network, *stack)) else {
                println!("{:<18}not measured", stack.name());
                continue;
            };
            let row = Row::new(figures, options, (*network, *stack), of_stack);
            let against = |other: Stack| {
                ratio(
                    samples,
                    (*network, *stack),
                    (*network, other),
                    Quantity::Cpu,
                )
                .map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}"))
            };
            println!(
                "{:<18}{:>8.0}{:>9.3}{:>9.3}{:>9.3}{:>9}{:>9}{:>8.0}{:>8.0}{:>7}",
                stack.name(),
                row.goodput,
                row.server,
                row.client,
                row.both,
                against(Stack::Quinn),
                against(Stack::TlsTcp),
                row.server_peak_mib,
                row.client_peak_mib,
                row.mtu.map_or_else(|| "-".into(), |mtu| mtu.to_string()),
            );
            groups[0].bars.push(Bar {
                name: stack.name().into(),
                values: vec![row.server, row.client],
            });
            groups[1].bars.push(Bar {
                name: stack.name().into(),
                values: vec![row.goodput],
            });
        }
        let [of_cpu, of_goodput] = groups;
        cpu.groups.push(of_cpu);
        goodput.groups.push(of_goodput);
    }
    for (name, this, that, quantity) in RATIOS {
        if let Some(ratio) = ratio(samples, *this, *that, *quantity) {
            figures.set(name, ratio);
        }
    }
    figures.chart("cpu", cpu);
    figures.chart("goodput", goodput);
    figures.note(format!(
        "{} MiB from a warm page cache to {}, in pieces of 1 MiB with {} outstanding, {} rounds in turn after one that warms up and verifies; ratios are medians of the ratios within the rounds; processor binding: {:?}",
        options.size,
        match options.sink {
            SinkKind::File => "a file that is overwritten",
            SinkKind::Null => "nowhere (no file, after the first round)",
        },
        options.streams,
        options.rounds,
        options.pin
    ));
}

/// The medians of one stack on one network.
struct Row {
    goodput: f64,
    server: f64,
    client: f64,
    both: f64,
    server_peak_mib: f64,
    client_peak_mib: f64,
    mtu: Option<u16>,
}

impl Row {
    fn new(figures: &mut Figures, options: &Options, side: Side, samples: &[Sample]) -> Self {
        let prefix = format!("{}_{}", side.0.name(), side.1.name()).replace('-', "_");
        let mut set = |name: &str, of: &dyn Fn(&Sample) -> f64| {
            let values: Vec<f64> = samples.iter().map(of).collect();
            figures.set_median(&format!("{prefix}_{name}"), &values)
        };
        let gib = gib(options);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let row = Self {
            goodput: set("mib_per_s", &|sample| gib * 1024.0 / sample.seconds),
            server: set("server_cpu_s_per_gib", &|sample| sample.server_cpu_s / gib),
            client: set("client_cpu_s_per_gib", &|sample| sample.client_cpu_s / gib),
            both: set("cpu_s_per_gib", &|sample| Quantity::Cpu.of(sample) / gib),
            server_peak_mib: set("server_peak_mib", &|sample| mib(sample.server_peak_bytes)),
            client_peak_mib: set("client_peak_mib", &|sample| mib(sample.client_peak_bytes)),
            mtu: samples.last().and_then(|sample| sample.mtu),
        };
        if let Some(mtu) = row.mtu {
            figures.set(&format!("{prefix}_udp_payload_bytes"), mtu.into());
        }
        row
    }
}

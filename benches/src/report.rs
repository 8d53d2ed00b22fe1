//! Medians, ratios, and the table.

use crate::measure::Run;
use crate::scenario::{Goal, Scenario};

/// What was measured of one scenario on one file system.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rounds {
    /// Runs of `qmerge`.
    pub(crate) ours: Vec<Run>,
    /// Runs of `qemu-img`.
    pub(crate) theirs: Vec<Run>,
    /// Runs of the part that is counted apart.
    pub(crate) apart: Vec<Run>,
}

/// The middle of some values (the mean of the two in the middle); 0 if there are none.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let at = |n: usize| sorted.get(n).copied().unwrap_or(0.0);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => at(n / 2),
        n => (at(n / 2 - 1) + at(n / 2)) / 2.0,
    }
}

/// The head of the table.
pub(crate) const HEAD: &str = "\
| file system | scenario | qmerge s (min to max) | qemu-img s (min to max) | ratio | CPU s | anonymous MiB | goal |
| --- | --- | --- | --- | --- | --- | --- | --- |";

/// One line of the table. Where blocks can be shared the goal is another one.
pub(crate) fn line(fs: &str, shares: bool, scenario: &Scenario, rounds: &Rounds) -> String {
    let wall = |runs: &[Run]| median(runs.iter().map(|run| run.wall));
    let apart = wall(&rounds.apart);
    let ours = wall(&rounds.ours);
    let ratio = (!rounds.theirs.is_empty()).then(|| wall(&rounds.theirs) / (ours - apart).max(0.001));
    let memory = |runs: &[Run]| runs.iter().map(|run| run.anonymous).max().unwrap_or(0) >> 20;
    let cpu = |runs: &[Run]| median(runs.iter().map(|run| run.cpu));
    let pair = |f: &dyn Fn(&[Run]) -> String| match rounds.theirs.is_empty() {
        true => f(&rounds.ours),
        false => format!("{} / {}", f(&rounds.ours), f(&rounds.theirs)),
    };
    let goal = match (scenario.goal, ratio) {
        (Goal::Memory, _) => format!("64 MiB: {}", verdict(memory(&rounds.ours) <= 64)),
        (Goal::Faster { copied, shared }, Some(ratio)) => {
            let goal = if shares { shared } else { copied };
            format!("{goal}: {}", verdict(ratio >= goal))
        }
        (Goal::Faster { .. }, None) => "not compared".into(),
    };
    let counted = if rounds.apart.is_empty() { String::new() } else { format!(", {apart:.3} apart") };
    format!(
        "| {fs} | {}: {} | {}{counted} | {} | {} | {} | {} | {goal} |",
        scenario.name,
        scenario.about,
        times(&rounds.ours),
        if rounds.theirs.is_empty() { "-".into() } else { times(&rounds.theirs) },
        ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")),
        pair(&|runs| format!("{:.2}", cpu(runs))),
        pair(&|runs| memory(runs).to_string()),
    )
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

fn times(runs: &[Run]) -> String {
    let walls = || runs.iter().map(|run| run.wall);
    let (min, max) = (walls().fold(f64::INFINITY, f64::min), walls().fold(0.0, f64::max));
    format!("{:.3} ({min:.3} to {max:.3})", median(walls()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert_eq!(median([].into_iter()), 0.0);
    }

    #[test]
    fn a_line_tells_ratio_and_goal() {
        let scenario = crate::scenario::ALL.iter().find(|s| s.name == "scattered").unwrap();
        let run = |wall| Run { wall, cpu: wall, anonymous: 5 << 20 };
        let rounds = Rounds {
            ours: vec![run(1.0), run(2.0), run(3.0)],
            theirs: vec![run(6.0)],
            apart: vec![run(0.5)],
        };
        let line = line("ext4", false, scenario, &rounds);
        assert!(
            line.contains("| 2.000 (1.000 to 3.000), 0.500 apart | 6.000 (6.000 to 6.000) | 4.00 |"),
            "{line}"
        );
        assert!(line.ends_with("| 2.00 / 6.00 | 5 / 5 | 1.3: met |"), "{line}");
        assert!(super::line("xfs", true, scenario, &rounds).ends_with("| 8: missed |"));
    }
}

//! Which of the pending writes a power cut lets through.

use kit::Random;

/// Sets of units, each of which a power cut may let through: all sets of a few units; else none, all, the
/// first ones, single ones, all but one, and random ones.
pub(super) fn masks(
    n: usize,
    exhaustive: usize,
    listed: usize,
    random: usize,
    dice: &mut Random,
) -> Vec<Vec<bool>> {
    if n <= exhaustive.min(20) {
        return (0..1u64 << n).map(|mask| (0..n).map(|i| mask >> i & 1 == 1).collect()).collect();
    }
    let mut sets = vec![vec![false; n], vec![true; n]];
    for at in positions(n, listed, dice) {
        sets.push((0..n).map(|i| i <= at).collect());
        sets.push((0..n).map(|i| i == at).collect());
        sets.push((0..n).map(|i| i != at).collect());
    }
    for _ in 0..random {
        // Some power cuts lose little, and some leave little.
        let of = [2, 2, 2, 8, 8][dice.below(5) as usize];
        let rare = dice.one_in(2);
        sets.push((0..n).map(|_| dice.one_in(of) == rare).collect());
    }
    sets
}

/// All positions below `n`, or `most` of them.
pub(super) fn positions(n: usize, most: usize, dice: &mut Random) -> Vec<usize> {
    if n <= most {
        return (0..n).collect();
    }
    (0..most).map(|_| dice.below(n as u64) as usize).collect()
}

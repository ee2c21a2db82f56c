// SPDX-License-Identifier: PostgreSQL
//! Medians, percentiles, spreads.

/// Several measurements of one thing.
#[derive(Clone, Debug, Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Takes measurements in any order; there must be at least one when it is asked for something.
    pub fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Sample(values)
    }

    /// The value that a part of the measurements, 0 to 1, does not exceed (nearest rank).
    pub fn percentile(&self, part: f64) -> f64 {
        let rank = (part * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    /// The middle; of an even number the mean of the two in the middle.
    pub fn median(&self) -> f64 {
        let half = self.0.len() / 2;
        if self.0.len().is_multiple_of(2) { (self.0[half - 1] + self.0[half]) / 2.0 } else { self.0[half] }
    }

    /// The least and the greatest.
    pub fn spread(&self) -> (f64, f64) {
        (self.0[0], self.0[self.0.len() - 1])
    }
}

/// Each measurement over the one that it was taken in a pair with.
pub fn ratios(pairs: &[(f64, f64)]) -> Sample {
    Sample::new(pairs.iter().map(|(measured, baseline)| measured / baseline).collect())
}

/// The first of each pair.
pub fn measured(pairs: &[(f64, f64)]) -> Sample {
    Sample::new(pairs.iter().map(|pair| pair.0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measurements() {
        let sample = Sample::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(
            (sample.percentile(0.5), sample.percentile(0.99), sample.percentile(0.0)),
            (2.0, 4.0, 1.0)
        );
        assert_eq!((sample.median(), sample.spread()), (2.5, (1.0, 4.0)));
        assert_eq!(Sample::new(vec![7.0]).median(), 7.0);
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        assert_eq!(ratios(&[(1.0, 2.0), (3.0, 3.0), (4.0, 2.0)]).median(), 1.0);
    }
}

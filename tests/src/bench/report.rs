// SPDX-License-Identifier: PostgreSQL
//! The table that a benchmark ends with, and the same as JSON.

use serde_json::{Value, json};

use super::statistics::{Sample, measured, ratios};

/// What is to be reached, by the ratio or, where there is none, by the value itself.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

/// One result.
#[derive(Clone, Debug)]
pub struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    ratio: Option<f64>,
    spread: (f64, f64),
    goal: Option<Goal>,
}

impl Row {
    /// The median of what was measured in pairs with a baseline, and of the ratios.
    pub fn of_pairs(
        name: impl Into<String>,
        unit: &'static str,
        pairs: &[(f64, f64)],
        goal: Option<Goal>,
    ) -> Row {
        let ratios = ratios(pairs);
        Row {
            name: name.into(),
            value: measured(pairs).median(),
            unit,
            ratio: Some(ratios.median()),
            spread: ratios.spread(),
            goal,
        }
    }

    /// The median of a value that is judged by itself.
    pub fn of_values(
        name: impl Into<String>,
        unit: &'static str,
        values: &Sample,
        goal: Option<Goal>,
    ) -> Row {
        Row { name: name.into(), value: values.median(), unit, ratio: None, spread: values.spread(), goal }
    }

    fn reached(&self) -> Option<bool> {
        let judged = self.ratio.unwrap_or(self.value);
        self.goal.map(|goal| match goal {
            Goal::AtLeast(bound) => judged >= bound,
            Goal::AtMost(bound) => judged <= bound,
        })
    }

    fn goal(&self) -> Option<String> {
        self.goal.map(|goal| match goal {
            Goal::AtLeast(bound) => format!(">= {bound}"),
            Goal::AtMost(bound) => format!("<= {bound}"),
        })
    }

    fn cells(&self) -> [String; 6] {
        let (least, greatest) = self.spread;
        let reached = self.reached().map_or("", |reached| if reached { "reached" } else { "MISSED" });
        [
            self.name.clone(),
            format!("{} {}", number(self.value), self.unit),
            self.ratio.map(number).unwrap_or_default(),
            format!("{} to {}", number(least), number(greatest)),
            self.goal().unwrap_or_default(),
            reached.to_owned(),
        ]
    }

    fn json(&self) -> Value {
        json!({"name": self.name, "value": self.value, "unit": self.unit, "ratio": self.ratio, "goal": self.goal()})
    }
}

/// Prints the table; as Markdown, so that it can be pasted. With `as_json` the last line is one object.
pub fn print(bench: &str, rows: &[Row], as_json: bool) {
    let head = ["", "median", "ratio", "spread", "goal", ""].map(str::to_owned);
    let cells: Vec<[String; 6]> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let widths: [usize; 6] =
        std::array::from_fn(|at| cells.iter().map(|row| row[at].chars().count()).max().unwrap_or(0));
    println!();
    for (line, row) in cells.iter().enumerate() {
        let padded: Vec<String> =
            std::iter::zip(row, widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("| {} |", padded.join(" | "));
        if line == 0 {
            println!("|{}|", widths.map(|width| "-".repeat(width + 2)).join("|"));
        }
    }
    if as_json {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        println!("{}", json!({"bench": bench, "rows": rows}));
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_judged_by_the_ratio_or_else_by_the_value() {
        let row = Row::of_pairs("a", "events/s", &[(900.0, 1000.0)], Some(Goal::AtLeast(0.95)));
        assert_eq!(row.reached(), Some(false));
        assert_eq!(row.json()["goal"], ">= 0.95");
        let row = Row::of_values("b", "ms", &Sample::new(vec![1.5]), Some(Goal::AtMost(2.0)));
        assert_eq!((row.reached(), &row.json()["ratio"]), (Some(true), &Value::Null));
        assert_eq!(Row::of_values("c", "ms", &Sample::new(vec![1.5]), None).reached(), None);
    }
}

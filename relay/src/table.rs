// SPDX-License-Identifier: PostgreSQL
//! Objects as a table for people.

use serde_json::Value;

/// The longest cell; more is cut.
const CELL_CHARS: usize = 60;

/// A header and a line for each row. A column that is empty in all rows is left out.
pub fn format(rows: &[Value], columns: &[&str]) -> String {
    let cells = |row: &Value| columns.iter().map(|column| cell(&row[column])).collect::<Vec<_>>();
    let body: Vec<Vec<String>> = rows.iter().map(cells).collect();
    let shown: Vec<usize> =
        (0..columns.len()).filter(|&at| body.iter().any(|row| !row[at].is_empty())).collect();
    let head: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(&body).collect();
    let width = |at: usize| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for line in &lines {
        let padded: Vec<String> = shown.iter().map(|&at| format!("{:<1$}", line[at], width(at))).collect();
        text += padded.join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => format!("{float:.1}"),
            _ => number.to_string(),
        },
        other => other.to_string(),
    };
    match text.char_indices().nth(CELL_CHARS) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_aligned_and_empty_ones_left_out() {
        let rows = [
            json!({"name": "billing", "lag": 0.25, "dead": 12, "why": null}),
            json!({"name": "a", "lag": 100.0, "dead": 0, "why": null}),
        ];
        let expected = "name     lag    dead\nbilling  0.2    12\na        100.0  0\n";
        assert_eq!(format(&rows, &["name", "lag", "dead", "why"]), expected);
        let long = json!({"name": "x".repeat(61)});
        assert!(format(&[long], &["name"]).contains(&format!("{}…\n", "x".repeat(60))));
    }
}

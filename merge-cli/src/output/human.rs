//! Aligned text for people.

use std::ffi::OsStr;
use std::fmt::Write;

/// `name: value` lines with the values in one column; a value's further lines are indented to it.
#[derive(Debug, Default)]
pub(crate) struct Fields(Vec<(String, String)>);

impl Fields {
    /// Adds a line.
    pub(crate) fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0.push((name.to_owned(), value.into()));
    }

    /// The text, without a last line end.
    pub(crate) fn render(&self) -> String {
        let width = self.0.iter().map(|(name, _)| name.chars().count() + 1).max().unwrap_or_default();
        let mut text = String::new();
        for (name, value) in &self.0 {
            let mut label = format!("{name}:");
            for line in value.lines() {
                let _ = writeln!(text, "{label:<width$}  {line}");
                label.clear();
            }
        }
        text.truncate(text.trim_end().len());
        text
    }
}

/// A table with a head; the columns that `right` names are aligned to the right.
#[derive(Debug)]
pub(crate) struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with the given head; a title that begins with `>` makes a column of numbers.
    pub(crate) fn new(head: &[&str]) -> Self {
        let right = head.iter().map(|title| title.starts_with('>')).collect();
        let titles = head.iter().map(|title| title.trim_start_matches('>').to_owned()).collect();
        Self { right, rows: vec![titles] }
    }

    /// Adds a row with one cell for each column.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The text, without a last line end.
    pub(crate) fn render(&self) -> String {
        let mut widths = vec![0; self.right.len()];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let lines = self.rows.iter().map(|row| {
            let mut line = String::new();
            for ((cell, &width), &right) in row.iter().zip(&widths).zip(&self.right) {
                let _ =
                    if right { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:<width$}  ") };
            }
            line.trim_end().to_owned()
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// A word in the number that `count` asks for.
pub(crate) fn plural(count: u64, one: &str, many: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {many}") }
}

/// Words that somebody else chose, as they may be shown on a terminal.
pub(crate) fn printable(text: &str) -> String {
    qcow2::error::shown(text)
}

/// Names, one behind the other, as they may be shown on a terminal.
pub(crate) fn list(names: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    names.into_iter().map(qcow2::error::shown).collect::<Vec<_>>().join(", ")
}

/// A word for the shell, quoted if it needs to be.
pub(crate) fn shell_word(word: &str) -> String {
    crate::hint::quoted(word.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_align_and_indent_further_lines() {
        let mut fields = Fields::default();
        fields.add("image", "a.qcow2");
        fields.add("backing file", "b.qcow2\n/x/b.qcow2");
        assert_eq!(
            fields.render(),
            "image:         a.qcow2\nbacking file:  b.qcow2\n               /x/b.qcow2"
        );
    }

    #[test]
    fn tables_align_both_ways() {
        let mut table = Table::new(&["INDEX", ">SIZE", "FILE"]);
        table.row(vec!["[2]".into(), "1 GiB".into(), "a".into()]);
        table.row(vec!["[1]".into(), "512 MiB".into(), "base".into()]);
        assert_eq!(table.render(), "INDEX     SIZE  FILE\n[2]      1 GiB  a\n[1]    512 MiB  base");
    }
}

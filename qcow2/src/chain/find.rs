//! Finding a layer by what a user calls it.

use crate::error::shown;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Chain, Layer};
use crate::error::{Error, FileOp, Result};
use crate::storage::{Host, if_there};

impl Chain {
    /// The position in [`Chain::layers`] of the layer that `spec` names: its path (any path that leads to
    /// the file), its name as written in the layer above, or its index: `[1]` or `vda[1]` is the bottom.
    ///
    /// # Errors
    /// [`Error::Usage`] with the layers that there are, if none fits or more than one.
    pub fn find(&self, host: &dyn Host, spec: impl AsRef<OsStr>) -> Result<usize> {
        let spec = spec.as_ref();
        let path = Path::new(spec);
        let stat = if_there(host.stat(path)).map_err(|e| Error::io(path, FileOp::Stat, None, e))?;
        let id = stat.map(|stat| stat.id);
        let named = |layer: &Layer| {
            Some(layer.id) == id
                || layer.path.as_os_str() == spec
                || layer.written_name.as_deref() == Some(spec.as_bytes())
        };
        let fitting: Vec<usize> =
            self.layers.iter().enumerate().filter_map(|(at, layer)| named(layer).then_some(at)).collect();
        match (fitting.as_slice(), index(spec)) {
            ([at], _) => Ok(*at),
            ([], Some(index)) if (1..=self.layers.len()).contains(&index) => Ok(index - 1),
            ([], _) => Err(self.usage(&format!("no layer '{}' in the chain", shown(spec)))),
            _ => Err(self.usage(&format!("more than one layer is called '{}'", shown(spec)))),
        }
    }

    fn usage(&self, what: &str) -> Error {
        let mut text = format!("{what}; its layers are:");
        for layer in self.layers.iter().rev() {
            let active = if layer.index == self.layers.len() { " (active)" } else { "" };
            // Writing to a string cannot fail.
            let _ = write!(text, "\n  [{}] {}{active}", layer.index, shown(&layer.path));
        }
        Error::Usage(text)
    }
}

/// The number in `[3]` or `vda[3]`, libvirt's notation; `None` if anything but digits stands between the
/// brackets.
pub(crate) fn index(spec: impl AsRef<OsStr>) -> Option<usize> {
    let (_, digits) = spec.as_ref().to_str()?.strip_suffix(']')?.split_once('[')?;
    if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::index;

    #[test]
    fn indexes_stand_in_brackets() {
        assert_eq!(index("[1]"), Some(1));
        assert_eq!(index("vda[12]"), Some(12));
        for no in [
            "1",
            "[]",
            "[+1]",
            "[1]x",
            "[-1]",
            "[1",
            "vda",
            "[99999999999999999999999]",
            "vda[1][1]",
            "[1][2]",
            "[[1]",
        ] {
            assert_eq!(index(no), None, "{no}");
        }
    }
}

//! Arguments of `qmerge relink`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgGroup, Args};
use qcow2::image::ImageFormat;

use super::{ImageArgs, LayerFormat, parse_layer_format};

/// `qmerge relink`
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("names").required(true).multiple(true).args(["backing", "data_file", "moved"]))]
pub(crate) struct RelinkArgs {
    /// The image whose header is to have other names; with --moved, folders in which images are looked for
    #[arg(required = true, value_name = "IMAGE|DIR")]
    pub(crate) paths: Vec<PathBuf>,

    /// The name of the backing file, as it is to stand in the header
    ///
    /// A relative path begins at the folder of IMAGE, as for QEMU.
    #[arg(long, value_name = "NAME", help_heading = "Names")]
    pub(crate) backing: Option<OsString>,

    /// The format of the backing file, where the header does not say it, or says another one
    ///
    /// With LAYER=FMT that of a file further below, whose overlay does not state it. Repeatable.
    #[arg(long, value_name = "FMT", help_heading = "Names", conflicts_with = "moved", value_parser = format())]
    pub(crate) backing_format: Vec<GivenFormat>,

    /// The name of the external data file, as it is to stand in the header
    ///
    /// A relative path begins at the working directory of whoever opens the image, as for QEMU.
    #[arg(long, value_name = "NAME", help_heading = "Names")]
    pub(crate) data_file: Option<OsString>,

    /// Correct the names of all images below DIR that begin with OLD: it lies at NEW now
    ///
    /// A folder, or one file. A file at its old place in the moved folder counts as the right one if nothing is left at the
    /// old name and it has the format that the header says. What is not proved is named and left as it is.
    #[arg(long, value_name = "OLD=NEW", help_heading = "Names", value_parser = moved(),
        conflicts_with_all = ["backing", "data_file", "trust"])]
    pub(crate) moved: Option<MovedPair>,

    /// Print the plan and change nothing
    #[arg(short = 'n', long, help_heading = "How")]
    pub(crate) dry_run: bool,

    /// Take the new names on your word, where nothing proves that they lead to the right files
    #[arg(long, help_heading = "How")]
    pub(crate) trust: bool,

    /// Keep the record of the change in DIR, for folders that cannot be written
    #[arg(long, value_name = "DIR", help_heading = "How", hide_short_help = true)]
    pub(crate) journal_dir: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) image: ImageArgs,
}

/// `OLD=NEW` of `--moved`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MovedPair {
    /// Where it lay.
    pub(crate) old: PathBuf,
    /// Where it lies.
    pub(crate) new: PathBuf,
}

/// `FMT` or `LAYER=FMT` of `--backing-format`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GivenFormat {
    /// Of the backing file that is named.
    Backing(ImageFormat),
    /// Of a file that the user names.
    Layer(LayerFormat),
}

fn format() -> impl TypedValueParser<Value = GivenFormat> {
    OsStringValueParser::new().try_map(|text| {
        if text.as_bytes().contains(&b'=') {
            return parse_layer_format(&text).map(GivenFormat::Layer);
        }
        let word = text.to_string_lossy();
        let format = ImageFormat::from_name(&word).map(GivenFormat::Backing);
        format.ok_or_else(|| format!("'{word}' is no format that is known: raw or qcow2"))
    })
}

fn moved() -> impl TypedValueParser<Value = MovedPair> {
    OsStringValueParser::new().try_map(|text| parse_moved(&text))
}

fn parse_moved(text: &OsStr) -> Result<MovedPair, &'static str> {
    const HOW: &str = "write OLD=NEW, as in /old/folder=/new/folder";
    let bytes = text.as_bytes();
    let signs: Vec<_> = (0..bytes.len()).filter(|&at| bytes.get(at) == Some(&b'=')).collect();
    let [at] = signs[..] else {
        return Err(if signs.is_empty() {
            HOW
        } else {
            "a folder whose name holds '=' cannot be named here"
        });
    };
    let (old, new) = (bytes.get(..at).unwrap_or_default(), bytes.get(at + 1..).unwrap_or_default());
    if old.is_empty() || new.is_empty() {
        return Err(HOW);
    }
    Ok(MovedPair { old: OsStr::from_bytes(old).into(), new: OsStr::from_bytes(new).into() })
}

pub(super) const EXAMPLES: &str = "\
Examples:
  qmerge relink vm.qcow2 --backing ../bases/base.qcow2   it was moved there
  qmerge relink vm.qcow2 --backing base.raw --trust      you know that it is the right file
  qmerge relink vm.qcow2 --data-file /data/vm.raw
  qmerge relink --moved /old/vms=/srv/vms /srv/vms -n    what would be corrected below /srv/vms
  qmerge relink --moved /old/vms=/srv/vms /srv/vms";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_has_two_ends() {
        let expected = MovedPair { old: "/a b".into(), new: OsStr::from_bytes(b"/c\xe9").into() };
        assert_eq!(parse_moved(OsStr::from_bytes(b"/a b=/c\xe9")), Ok(expected));
        for bad in ["/a", "=/b", "/a=", "/a=b=/c"] {
            assert!(parse_moved(bad.as_ref()).is_err(), "{bad}");
        }
    }
}

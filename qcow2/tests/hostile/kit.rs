//! What the tests of hostile images share.

use std::path::Path;

use qcow2::fuzzing::sample;
use qcow2::image::{ClusterCache, Extent, Image, ImageFormat};
use qcow2::storage::{Access, Host, MemHost};
use qcow2::units::{GuestOffset, GuestRange};
use qcow2::{Error, ErrorKind, Result};

/// Where the image under test lies.
pub(crate) const IMAGE: &str = "/vm/disk.qcow2";

/// Opens an image with its data file, maps it whole, and reads it whole; the guest's bytes.
///
/// # Panics
/// If anything was written.
pub(crate) fn read_all(image: &sample::Image) -> Result<Vec<u8>> {
    let host = MemHost::new();
    host.add(IMAGE, &image.bytes).unwrap();
    host.add("/vm/data.raw", &image.data).unwrap();
    let file = host.open(Path::new(IMAGE), Access::Read).unwrap();
    let data = host.open(Path::new("/vm/data.raw"), Access::Read).unwrap();
    let outcome = Image::open(Path::new(IMAGE), file, ImageFormat::Qcow2, Some(data))
        .and_then(|opened| read_guest(&opened));
    assert!(host.content(IMAGE).unwrap() == image.bytes, "reading has written");
    outcome
}

fn read_guest(image: &Image) -> Result<Vec<u8>> {
    let whole = GuestRange { start: GuestOffset::ZERO, len: image.virtual_size() };
    assert!(whole.len <= 64 << 20, "only small disks are read whole");
    let mut extents: Vec<Extent> = Vec::new();
    image.map(whole, &mut extents)?;
    let mut guest = vec![0; whole.len as usize];
    let mut cache = ClusterCache::new();
    for extent in &extents {
        let start = extent.range.start.get() as usize;
        let bytes = &mut guest[start..start + extent.range.len as usize];
        image.read_extent(extent, bytes, &mut cache, 0)?;
    }
    Ok(guest)
}

/// What an error must say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    /// The class, which decides the exit code.
    pub(crate) kind: ErrorKind,
    /// The field's name, or a part of it.
    pub(crate) field: &'static str,
    /// The host offset that the error points to.
    pub(crate) offset: u64,
}

/// A field of a damaged image.
pub(crate) fn damaged(field: &'static str, offset: u64) -> Expected {
    Expected { kind: ErrorKind::Damaged, field, offset }
}

/// A field that asks for what is not supported.
pub(crate) fn unsupported(field: &'static str, offset: u64) -> Expected {
    Expected { kind: ErrorKind::Unsupported, field, offset }
}

/// Checks that an error names the file, the field, its offset, what was found and what was expected.
pub(crate) fn assert_says(error: &Error, expected: Expected, case: &str) {
    let (path, source) = match error {
        Error::Format { path, source } | Error::Mapping { path, source, .. } => (path, source),
        other => panic!("{case}: not an error about the format: {other}"),
    };
    let text = error.to_string();
    assert_eq!(path, Path::new(IMAGE), "{case}: {text}");
    assert_eq!(error.kind(), expected.kind, "{case}: {text}");
    assert!(source.field().contains(expected.field), "{case}: the field is not '{}': {text}", expected.field);
    assert_eq!(source.offset(), expected.offset, "{case}: {text}");
    assert!(text.contains(IMAGE) && text.contains("found") && text.contains("expected"), "{case}: {text}");
}

/// A damage that can be done to an image.
pub(crate) type Damage = Box<dyn Fn(&mut sample::Image)>;

/// Does each damage to a fresh image, and checks what reading the image then says.
pub(crate) fn assert_refused(fresh: impl Fn() -> sample::Image, cases: Vec<(&str, Expected, Damage)>) {
    read_all(&fresh()).expect("the image must be readable before it is damaged");
    for (case, expected, damage) in cases {
        let mut image = fresh();
        damage(&mut image);
        match read_all(&image) {
            Ok(_) => panic!("{case}: the image was read"),
            Err(error) => assert_says(&error, expected, case),
        }
    }
}

/// Overwrites a 32-bit field.
pub(crate) fn u32_at(offset: u64, value: u32) -> Damage {
    Box::new(move |image| image.put_u32(offset, value))
}

/// Overwrites a 64-bit field.
pub(crate) fn u64_at(offset: u64, value: u64) -> Damage {
    Box::new(move |image| image.put_u64(offset, value))
}

/// Several damages at once.
pub(crate) fn all(damages: Vec<Damage>) -> Damage {
    Box::new(move |image| damages.iter().for_each(|damage| damage(image)))
}

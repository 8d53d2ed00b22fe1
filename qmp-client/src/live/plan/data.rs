//! Which external data file may be emptied with its image.

use std::path::Path;

use qcow2::chain::BackingName;
use qcow2::image::Qcow2;
use qcow2::storage::{Access, Host, OsHost};

use crate::block::graph::Layer;
use crate::live::discover::{Files, file_id};

/// Whether the image's header names the data file that QEMU has open for it. QEMU can be given another one; then nobody has said
/// what becomes of the one that the header names.
pub(super) fn is_named(files: &Files, layer: &Layer) -> bool {
    named_by_header(files, layer).is_some()
}

fn named_by_header(files: &Files, layer: &Layer) -> Option<()> {
    let open = file_id(Path::new(layer.data_file.as_ref()?)).filter(|id| !files.is_elsewhere(*id))?;
    let path = Path::new(&layer.file);
    let file = OsHost.open(path, Access::Read).ok()?;
    let cluster0 = Qcow2::read_cluster0(path, &*file).ok()?;
    let name = BackingName::parse_data_file(cluster0.data_file_name()?).ok()?;
    (file_id(&name.resolve(path)) == Some(open)).then_some(())
}

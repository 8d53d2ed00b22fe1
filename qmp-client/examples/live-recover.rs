//! What a live merge left whose QEMU, client or host was killed, put right. QEMU need not run.
//!
//! ```text
//! cargo run -p qmp-client --example live-recover -- /vm/active.qcow2
//! ```

use std::error::Error;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use qmp_client::qcow2::merge::Progress;
use qmp_client::{Recovery, Unfinished};

struct Silent;

impl Progress for Silent {
    fn written(&self, _done: u64, _total: u64) {}
}

fn main() -> Result<(), Box<dyn Error>> {
    let image = std::env::args().nth(1).ok_or("name the image that was active")?;
    recover(Path::new(&image))
}

/// Deals with every merge of which the image was a part. Where only the user can know which image is the disk, nothing is
/// changed, and that is an error.
pub fn recover(image: &Path) -> Result<(), Box<dyn Error>> {
    for merge in Unfinished::of_image(image)? {
        let finding = merge.recover(Recovery::new(&Silent, &AtomicBool::new(false)));
        println!("{:?}: the disk is in {:?}; {:?}", finding.outcome, finding.valid_top, finding.did);
        if let Some(trouble) = finding.trouble {
            return Err(format!("{trouble:?}").into());
        }
    }
    Ok(())
}

//! Writes the seeds of the fuzzers of this crate: `qmp-fuzz-seeds DIR` makes `DIR/TARGET/NAME` for every target and seed.

use std::path::PathBuf;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let Some(dir) = env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "usage: qmp-fuzz-seeds DIR"));
    };
    for body in qmp_client::fuzzing::BODIES {
        let dir = dir.join(body.name);
        fs::create_dir_all(&dir)?;
        for (name, bytes) in (body.seeds)() {
            fs::write(dir.join(name), bytes)?;
        }
    }
    Ok(())
}

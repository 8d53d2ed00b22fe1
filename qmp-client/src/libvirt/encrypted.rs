//! Which images are encrypted, where no QEMU can be asked.

use std::path::Path;

use qcow2::format::{Container, Header};
use qcow2::image::ImageFormat;
use qcow2::storage::{Access, Host, OsHost};

/// As much of a file as its header takes.
const HEAD: usize = 512;

/// Whether an image is encrypted, by its first bytes; false for one that cannot be read.
pub fn is_encrypted(image: &Path) -> bool {
    let Ok(file) = OsHost.open(image, Access::Read) else { return false };
    match ImageFormat::detect(image, &*file) {
        Ok(ImageFormat::Foreign(Container::Luks)) => true,
        Ok(ImageFormat::Qcow2) => {
            let mut head = [0; HEAD];
            let read = file.read_exact_or_zero(&mut head, 0);
            read.is_ok() && Header::decode(&head).is_ok_and(|header| header.crypt_method != 0)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use qcow2::format::Geometry;

    use super::*;

    #[test]
    fn headers_tell_of_encryption() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let geometry = Geometry::new(16, 4, false).unwrap();
        let mut header = Header::new(3, geometry, 1 << 20);
        assert!(!is_encrypted(&at("plain", &header.encode())));
        header.crypt_method = 2;
        assert!(is_encrypted(&at("qcow2", &header.encode())));
        assert!(is_encrypted(&at("luks", b"LUKS\xba\xbe\0\x01rest of the header")));
        assert!(!is_encrypted(&at("raw", b"some bytes")) && !is_encrypted(Path::new("/no/such")));
    }
}

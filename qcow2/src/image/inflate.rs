//! Decompression of single clusters.

use std::io::Read;

use flate2::{Decompress, FlushDecompress, Status};
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use crate::format::Compression;

/// A zstd frame that asks for a larger window than this is refused; a cluster has 2 MiB at most.
const ZSTD_WINDOW_LIMIT: u64 = 8 << 20;

/// Inflates clusters; keeps its state and buffers for the next one, so each worker has its own.
pub(crate) struct Inflater {
    zlib: Decompress,
    zstd: FrameDecoder,
}

impl std::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflater").finish_non_exhaustive()
    }
}

impl Default for Inflater {
    fn default() -> Self {
        Self::new()
    }
}

impl Inflater {
    /// A new inflater.
    pub(crate) fn new() -> Self {
        let mut zstd = FrameDecoder::new();
        zstd.set_max_window_size(ZSTD_WINDOW_LIMIT);
        Self { zlib: Decompress::new(false), zstd }
    }

    /// Inflates one cluster into `out`, which has exactly the cluster's size. `data` may hold
    /// garbage behind the end of the stream (its length is known only to a sector).
    ///
    /// # Errors
    /// What is wrong with the stream: damaged, or shorter than the cluster.
    pub(crate) fn inflate(&mut self, kind: Compression, data: &[u8], out: &mut [u8]) -> Result<(), String> {
        match kind {
            Compression::Zlib => self.inflate_zlib(data, out),
            Compression::Zstd => self.inflate_zstd(data, out),
        }
    }

    fn inflate_zlib(&mut self, data: &[u8], out: &mut [u8]) -> Result<(), String> {
        self.zlib.reset(false);
        let status = self.zlib.decompress(data, out, FlushDecompress::Finish).map_err(|e| e.to_string())?;
        let produced = self.zlib.total_out();
        if produced == out.len() as u64 {
            return Ok(());
        }
        Err(match status {
            Status::StreamEnd => format!("the stream ends after {produced} bytes"),
            _ => format!("the stream is cut off after {produced} bytes"),
        })
    }

    fn inflate_zstd(&mut self, data: &[u8], out: &mut [u8]) -> Result<(), String> {
        let mut source = data;
        let mut filled = 0;
        // A cluster may be written as several frames.
        while filled < out.len() {
            let before = filled;
            let mut stream =
                StreamingDecoder::new_with_decoder(&mut source, &mut self.zstd).map_err(|e| e.to_string())?;
            while filled < out.len() {
                match stream.read(&mut out[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(e) => return Err(e.to_string()),
                }
            }
            if filled == before {
                return Err(format!("the stream ends after {filled} bytes"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn deflate(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn garbage_behind_a_stream_is_ignored() {
        let plain = vec![7; 4096];
        let mut stream = deflate(&plain);
        stream.extend_from_slice(&[0xff; 100]);
        let mut out = vec![0; 4096];
        Inflater::new().inflate(Compression::Zlib, &stream, &mut out).unwrap();
        assert_eq!(out, plain);
    }

    #[test]
    fn damaged_streams_are_errors_and_the_inflater_goes_on() {
        let mut inflater = Inflater::new();
        let mut out = vec![0; 4096];
        let good = deflate(&[1; 4096]);
        for kind in [Compression::Zlib, Compression::Zstd] {
            for bad in [&[][..], &[0xff; 64], &good[..good.len() / 2], &deflate(&[1; 100])] {
                assert!(inflater.inflate(kind, bad, &mut out).is_err());
            }
        }
        inflater.inflate(Compression::Zlib, &good, &mut out).unwrap();
        assert_eq!(out, vec![1; 4096]);
    }

    #[test]
    fn zstd_frames_may_follow_each_other() {
        use ruzstd::encoding::{CompressionLevel, compress_to_vec};
        let mut stream = compress_to_vec(&[1; 2048][..], CompressionLevel::Fastest);
        stream.extend(compress_to_vec(&[2; 2048][..], CompressionLevel::Fastest));
        let mut out = vec![0; 4096];
        Inflater::new().inflate(Compression::Zstd, &stream, &mut out).unwrap();
        assert_eq!((out[2047], out[2048]), (1, 2));
    }
}

//! Takes a model file in: what candle multiplies slowly is rewritten, all else is kept.
//!
//! candle has no fast kernels for `Q4_1`, `Q5_0` and `Q5_1` and would run them number by number.
//! As `Q8_0` the file is larger, but such a tensor loses nothing that could be heard (its blocks
//! have the same 32 numbers, now with 8 bits each) and runs at full speed.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QTensor};

use super::gguf::{ALIGNMENT, Entry, File, LoadError, kind_name, kind_number};

/// What became of a model file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// How many tensors were rewritten, by the kind that they had: ("Q4_1", 210).
    pub converted: Vec<(&'static str, usize)>,
    /// How many tensors were kept as they were.
    pub kept: usize,
    /// The length of the new file in bytes.
    pub bytes: u64,
}

/// Why a model file cannot be taken in.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The source cannot be read.
    #[error(transparent)]
    Source(#[from] LoadError),
    /// The destination cannot be written.
    #[error("cannot write {0}: {1}")]
    Destination(String, std::io::Error),
}

/// Copies the model file at `source` to `destination`, with the tensors that would run slowly
/// converted to `Q8_0`. The metadata is kept byte by byte (so `general.file_type` still tells what
/// the source was). The same source always gives the same bytes. The new file is on disk when this
/// returns; its directory entry is the caller's to sync. On an error a part of it may be left.
///
/// Holds at most a few copies of the largest tensor in memory. Takes seconds: not for the
/// asynchronous threads.
///
/// # Errors
/// When the source is no sound model file, or either file cannot be read or written.
pub fn requantise(source: &Path, destination: &Path) -> Result<Imported, ImportError> {
    let mut file = File::open(source)?;
    let unwritable = |error| ImportError::Destination(destination.display().to_string(), error);
    let entries = file.entries().to_vec();
    let header = header(&mut file, &entries)?;
    let out = fs::File::create(destination).map_err(unwritable)?;
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let mut written = 0u64;
    let mut write = |bytes: &[u8]| {
        let padding = bytes.len().next_multiple_of(ALIGNMENT as usize) - bytes.len();
        written += (bytes.len() + padding) as u64;
        out.write_all(bytes).and_then(|()| out.write_all(&[0; ALIGNMENT as usize][..padding]))
    };
    write(&header).map_err(unwritable)?;
    let mut imported = Imported { converted: Vec::new(), kept: 0, bytes: 0 };
    for entry in &entries {
        let rows = 0..entry.dims.first().copied().unwrap_or(1);
        if target(entry) == entry.kind {
            let bytes = file.bytes(entry, rows)?;
            write(&bytes).map_err(unwritable)?;
            imported.kept += 1;
            continue;
        }
        let plain = file.rows(entry, rows)?.dequantize(&Device::Cpu).map_err(LoadError::from)?;
        let new = QTensor::quantize(&plain, GgmlDType::Q8_0).map_err(LoadError::from)?;
        write(&new.data().map_err(LoadError::from)?).map_err(unwritable)?;
        let name = kind_name(entry.kind);
        match imported.converted.iter_mut().find(|(kind, _)| *kind == name) {
            Some((_, count)) => *count += 1,
            None => imported.converted.push((name, 1)),
        }
    }
    imported.bytes = written;
    let out = out.into_inner().map_err(|error| unwritable(error.into_error()))?;
    out.sync_all().map_err(unwritable)?;
    Ok(imported)
}

/// What the tensor becomes.
fn target(entry: &Entry) -> GgmlDType {
    match entry.kind {
        GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1 => GgmlDType::Q8_0,
        other => other,
    }
}

/// All before the data, without padding at its end. The tensors keep their order.
fn header(file: &mut File, entries: &[Entry]) -> Result<Vec<u8>, LoadError> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((entries.len() as u64).to_le_bytes());
    bytes.extend(file.metadata_count.to_le_bytes());
    bytes.extend(file.span(file.metadata_span)?);
    if file.number("general.alignment").is_some_and(|alignment| alignment != ALIGNMENT) {
        let alignment = "only files aligned to 32 bytes can be converted";
        return Err(LoadError::Unsupported(alignment.into()));
    }
    let mut offset = 0u64;
    for entry in entries {
        bytes.extend((entry.name.len() as u64).to_le_bytes());
        bytes.extend(entry.name.as_bytes());
        let dims = &entry.dims[entry.dims.len() - entry.rank as usize..];
        bytes.extend((dims.len() as u32).to_le_bytes());
        for dim in dims.iter().rev() {
            bytes.extend((*dim as u64).to_le_bytes());
        }
        let kind = target(entry);
        bytes.extend(kind_number(kind).to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        let elements: u64 = entry.dims.iter().map(|dim| *dim as u64).product();
        let length = elements / kind.block_size() as u64 * kind.type_size() as u64;
        offset += length.next_multiple_of(ALIGNMENT);
    }
    Ok(bytes)
}

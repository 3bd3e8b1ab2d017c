//! Reads model files in the GGUF format, and believes none of their numbers.
//!
//! A file is a header, metadata (keys with typed values), a table of tensors, and their data. Each
//! length that the header states is held against what is left of the file before anything is
//! allocated for it, and the tensors together may not be larger than the file: what a reader holds
//! is bounded by the size of the file, whatever the file says.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::{GgmlDType, QTensor};

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("cannot read the file: {0}")]
    Io(#[from] io::Error),
    /// It is not what it says it is, or was cut short.
    #[error("the file is broken: {0}")]
    Broken(String),
    /// It is well-formed, but nothing that this engine can run.
    #[error("{0}")]
    Unsupported(String),
}

/// `LoadError::Broken` from a format string.
macro_rules! broken {
    ($($arg:tt)*) => { $crate::model::embedded::gguf::LoadError::Broken(format!($($arg)*)) };
}
pub(super) use broken;

impl From<candle_core::Error> for LoadError {
    fn from(error: candle_core::Error) -> Self {
        // Only the first line: the rest is a backtrace.
        Self::Broken(error.to_string().lines().next().unwrap_or_default().to_owned())
    }
}

/// One value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    /// An array of numbers, as it lies in the file.
    Numbers(Kind, Vec<u8>),
    /// Something nested that no key of ours has: it is passed over.
    Other,
}

/// The types of values, by their numbers in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

/// Where a tensor lies, and what it is.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) kind: GgmlDType,
    /// Rows first: (rows, columns) of a matrix.
    pub(super) dims: Vec<usize>,
    /// How many dimensions the file states: a vector, one, has a row added in `dims`.
    pub(super) rank: u32,
    /// From the start of the data.
    pub(super) offset: u64,
    /// Its length in the file.
    pub(super) bytes: u64,
}

/// An opened file: its header is read, its tensors are not.
#[derive(Debug)]
pub(super) struct File {
    reader: BufReader<fs::File>,
    metadata: BTreeMap<String, Value>,
    /// In the order of the file.
    entries: Vec<Entry>,
    by_name: BTreeMap<String, usize>,
    /// The bytes of the metadata in the file, without the counts before them.
    pub(super) metadata_span: (u64, u64),
    pub(super) metadata_count: u64,
    data_start: u64,
}

const MAGIC: [u8; 4] = *b"GGUF";
/// What a file of ours is aligned to, and one that says nothing.
pub(super) const ALIGNMENT: u64 = 32;
/// No real file has more entries of either table.
const MAX_ENTRIES: u64 = 1 << 16;
/// No real name is longer.
const MAX_NAME: u64 = 1 << 12;
/// No real file nests arrays deeper (none at all nest them, so far).
const MAX_DEPTH: u32 = 4;
/// The largest dimension that a tensor may have.
const MAX_DIMENSION: u64 = 1 << 31;

impl File {
    /// Reads the header of the file at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let file = fs::File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(broken!("it is no regular file"));
        }
        let size = meta.len();
        let mut header = Header { reader: BufReader::new(file), at: 0, size };
        if header.array()? != MAGIC {
            return Err(LoadError::Unsupported("the file is not in the GGUF format".into()));
        }
        let version = header.u32()?;
        if !(2..=3).contains(&version) {
            return Err(LoadError::Unsupported(format!(
                "GGUF version {version} is not supported, only 2 and 3"
            )));
        }
        let (tensors, values) = (header.u64()?, header.u64()?);
        if tensors > MAX_ENTRIES || values > MAX_ENTRIES {
            return Err(broken!("it claims {tensors} tensors and {values} values"));
        }
        let metadata_start = header.at;
        let metadata = header.metadata(values)?;
        let metadata_span = (metadata_start, header.at);
        let mut entries = Vec::new();
        let mut by_name = BTreeMap::new();
        for index in 0..tensors {
            let entry = header.entry()?;
            if by_name.insert(entry.name.clone(), entries.len()).is_some() {
                return Err(broken!("tensor {index} ({}) is there twice", entry.name));
            }
            entries.push(entry);
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 16 => *n,
            Some(other) => return Err(broken!("an alignment of {other:?}")),
        };
        let data_start = header.at.next_multiple_of(alignment);
        let room = size.saturating_sub(data_start);
        let mut sum = 0u64;
        for entry in &entries {
            let end = entry.offset.checked_add(entry.bytes);
            if end.is_none_or(|end| end > room) {
                return Err(broken!("tensor {} lies beyond the end of the file", entry.name));
            }
            sum = sum.saturating_add(entry.bytes);
        }
        // Else tensors that lie over each other could ask for many times the file in memory.
        if sum > room {
            return Err(broken!("its tensors are larger than the file"));
        }
        let reader = header.reader;
        let metadata_count = values;
        Ok(Self { reader, metadata, entries, by_name, metadata_span, metadata_count, data_start })
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// A whole number that is not negative, of whatever width.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    pub(super) fn float(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::Float(x) => Some(*x),
            _ => None,
        }
    }

    pub(super) fn texts(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            Value::Texts(texts) => Some(texts),
            _ => None,
        }
    }

    /// An array of whole numbers of 32 bits.
    pub(super) fn numbers(&self, key: &str) -> Option<impl Iterator<Item = i32> + '_> {
        match self.get(key)? {
            Value::Numbers(Kind::I32 | Kind::U32, bytes) => {
                let (words, _) = bytes.as_chunks::<4>();
                Some(words.iter().map(|word| i32::from_le_bytes(*word)))
            }
            _ => None,
        }
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(super) fn entry(&self, name: &str) -> Option<&Entry> {
        self.by_name.get(name).map(|index| &self.entries[*index])
    }

    /// The bytes of some rows of a tensor (all of them: `0..rows`).
    pub(super) fn bytes(
        &mut self,
        entry: &Entry,
        rows: Range<usize>,
    ) -> Result<Vec<u8>, LoadError> {
        let all = entry.dims.first().copied().unwrap_or(1);
        if rows.start > rows.end || rows.end > all || all == 0 {
            return Err(broken!("tensor {} has no rows {rows:?}", entry.name));
        }
        let row = entry.bytes / all as u64;
        let start = self.data_start + entry.offset + rows.start as u64 * row;
        self.reader.seek(SeekFrom::Start(start))?;
        let length = usize::try_from(rows.len() as u64 * row)
            .map_err(|_| broken!("tensor {} is too large", entry.name))?;
        let mut bytes = vec![0; length];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Some rows of a tensor, as candle takes them.
    pub(super) fn rows(&mut self, entry: &Entry, rows: Range<usize>) -> Result<QTensor, LoadError> {
        let bytes = self.bytes(entry, rows.clone())?;
        let mut dims = entry.dims.clone();
        if let Some(first) = dims.first_mut() {
            *first = rows.len();
        }
        Ok(qtensor_from_ggml(entry.kind, &bytes, dims, &Device::Cpu)?)
    }

    /// Some rows of a matrix, filled up with zeros to so many columns (whole blocks of them).
    pub(super) fn padded_rows(
        &mut self,
        entry: &Entry,
        rows: Range<usize>,
        columns: usize,
    ) -> Result<QTensor, LoadError> {
        let [_, stated] = entry.dims[..] else {
            return Err(broken!("tensor {} is no matrix", entry.name));
        };
        if columns == stated {
            return self.rows(entry, rows);
        }
        let length = |columns| columns / entry.kind.block_size() * entry.kind.type_size();
        let bytes = self.bytes(entry, rows.clone())?;
        let mut padded = vec![0; rows.len() * length(columns)];
        let all = bytes.chunks_exact(length(stated));
        for (to, from) in padded.chunks_exact_mut(length(columns)).zip(all) {
            // A block of zero bytes is zeros, its scale being zero.
            to[..from.len()].copy_from_slice(from);
        }
        let dims = vec![rows.len(), columns];
        Ok(qtensor_from_ggml(entry.kind, &padded, dims, &Device::Cpu)?)
    }

    /// A whole tensor as plain numbers.
    pub(super) fn floats(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        let entry = self.entry(name).ok_or_else(|| broken!("tensor {name} is missing"))?.clone();
        let rows = 0..entry.dims.first().copied().unwrap_or(1);
        let tensor = self.rows(&entry, rows)?.dequantize(&Device::Cpu)?;
        Ok(tensor.flatten_all()?.to_vec1()?)
    }

    /// A part of the file as it lies there.
    pub(super) fn span(&mut self, span: (u64, u64)) -> Result<Vec<u8>, LoadError> {
        self.reader.seek(SeekFrom::Start(span.0))?;
        let mut bytes = Vec::new();
        let length = span.1.saturating_sub(span.0);
        self.reader.by_ref().take(length).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != length {
            return Err(broken!("it was cut short"));
        }
        Ok(bytes)
    }
}

/// The kind's name as it is written in file names.
pub(super) fn kind_name(kind: GgmlDType) -> &'static str {
    match kind {
        GgmlDType::F32 => "F32",
        GgmlDType::F16 => "F16",
        GgmlDType::BF16 => "BF16",
        GgmlDType::Q4_0 => "Q4_0",
        GgmlDType::Q4_1 => "Q4_1",
        GgmlDType::Q5_0 => "Q5_0",
        GgmlDType::Q5_1 => "Q5_1",
        GgmlDType::Q8_0 => "Q8_0",
        GgmlDType::Q8_1 => "Q8_1",
        GgmlDType::Q2K => "Q2_K",
        GgmlDType::Q3K => "Q3_K",
        GgmlDType::Q4K => "Q4_K",
        GgmlDType::Q5K => "Q5_K",
        GgmlDType::Q6K => "Q6_K",
        GgmlDType::Q8K => "Q8_K",
    }
}

/// The kind's number in a file.
pub(super) fn kind_number(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}

/// The kinds that a tensor may have: those that candle can read and multiply.
fn kind_of(number: u32) -> Option<GgmlDType> {
    use GgmlDType as D;
    [
        D::F32,
        D::F16,
        D::BF16,
        D::Q4_0,
        D::Q4_1,
        D::Q5_0,
        D::Q5_1,
        D::Q8_0,
        D::Q2K,
        D::Q3K,
        D::Q4K,
        D::Q5K,
        D::Q6K,
    ]
    .into_iter()
    .find(|kind| kind_number(*kind) == number)
}

impl Kind {
    fn of(number: u32) -> Result<Self, LoadError> {
        Ok(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::Text,
            9 => Self::Array,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return Err(broken!("a value of type {number}")),
        })
    }

    /// The bytes of one; none for those whose length is written before them.
    fn width(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Text | Self::Array => None,
        }
    }
}

/// Reads the header from front to back, and knows how much of the file is left.
struct Header {
    reader: BufReader<fs::File>,
    at: u64,
    size: u64,
}

impl Header {
    fn left(&self) -> u64 {
        self.size.saturating_sub(self.at)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LoadError> {
        if self.left() < N as u64 {
            return Err(broken!("it was cut short"));
        }
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn bytes(&mut self, length: u64) -> Result<Vec<u8>, LoadError> {
        if length > self.left() {
            return Err(broken!("a length of {length} where {} bytes are left", self.left()));
        }
        let length = usize::try_from(length).map_err(|_| broken!("a length of {length}"))?;
        let mut bytes = vec![0; length];
        self.reader.read_exact(&mut bytes)?;
        self.at += length as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, LoadError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, LoadError> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, LoadError> {
        let length = self.u64()?;
        let bytes = self.bytes(length)?;
        // Some files end their strings with a zero, and some tokens are no UTF-8.
        let text = String::from_utf8(bytes)
            .unwrap_or_else(|bad| String::from_utf8_lossy(bad.as_bytes()).into_owned());
        Ok(match text.find('\0') {
            Some(_) => text.trim_end_matches('\0').to_owned(),
            None => text,
        })
    }

    fn name(&mut self) -> Result<String, LoadError> {
        let length = self.u64()?;
        if length > MAX_NAME {
            return Err(broken!("a name of {length} bytes"));
        }
        let bytes = self.bytes(length)?;
        String::from_utf8(bytes).map_err(|_| broken!("a name that is no text"))
    }

    fn metadata(&mut self, values: u64) -> Result<BTreeMap<String, Value>, LoadError> {
        let mut metadata = BTreeMap::new();
        for _ in 0..values {
            let key = self.name()?;
            let kind = Kind::of(self.u32()?)?;
            let value = self.value(kind, 0)?;
            if metadata.contains_key(&key) {
                return Err(broken!("the key {key} is there twice"));
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: Kind, depth: u32) -> Result<Value, LoadError> {
        Ok(match kind {
            Kind::U8 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            Kind::U16 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            Kind::U32 => Value::Unsigned(u64::from(self.u32()?)),
            Kind::U64 => Value::Unsigned(self.u64()?),
            Kind::I8 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            Kind::I16 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            Kind::I32 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            Kind::I64 => Value::Signed(i64::from_le_bytes(self.array()?)),
            Kind::F32 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            Kind::F64 => Value::Float(f64::from_le_bytes(self.array()?)),
            Kind::Bool => Value::Bool(self.array::<1>()?[0] != 0),
            Kind::Text => Value::Text(self.text()?),
            Kind::Array => self.list(depth)?,
        })
    }

    fn list(&mut self, depth: u32) -> Result<Value, LoadError> {
        if depth >= MAX_DEPTH {
            return Err(broken!("arrays nested more than {MAX_DEPTH} deep"));
        }
        let kind = Kind::of(self.u32()?)?;
        let length = self.u64()?;
        // A text has its length before it, an array its type as well.
        let least = kind.width().unwrap_or(8);
        if length.checked_mul(least).is_none_or(|bytes| bytes > self.left()) {
            return Err(broken!("an array of {length} where {} bytes are left", self.left()));
        }
        match kind {
            Kind::Text => {
                let mut texts = Vec::new();
                for _ in 0..length {
                    texts.push(self.text()?);
                }
                Ok(Value::Texts(texts))
            }
            Kind::Array => {
                for _ in 0..length {
                    self.list(depth + 1)?;
                }
                Ok(Value::Other)
            }
            _ => Ok(Value::Numbers(kind, self.bytes(length * least)?)),
        }
    }

    fn entry(&mut self) -> Result<Entry, LoadError> {
        let name = self.name()?;
        let dimensions = self.u32()?;
        if !(1..=4).contains(&dimensions) {
            return Err(broken!("tensor {name} has {dimensions} dimensions"));
        }
        let mut dims = Vec::new();
        let mut elements = 1u64;
        for _ in 0..dimensions {
            let dim = self.u64()?;
            if !(1..=MAX_DIMENSION).contains(&dim) {
                return Err(broken!("tensor {name} has a dimension of {dim}"));
            }
            elements = elements
                .checked_mul(dim)
                .ok_or_else(|| broken!("tensor {name} has too many elements"))?;
            dims.push(usize::try_from(dim).map_err(|_| broken!("a dimension of {dim}"))?);
        }
        let number = self.u32()?;
        let kind = kind_of(number).ok_or_else(|| {
            LoadError::Unsupported(format!(
                "tensor {name} is of kind {number}, which is not supported; supported are F32, \
                 F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K"
            ))
        })?;
        let offset = self.u64()?;
        let block = kind.block_size();
        // A row is a whole number of blocks, so that any rows can be read alone.
        if !dims[0].is_multiple_of(block) {
            return Err(broken!("tensor {name} has rows of {} in blocks of {block}", dims[0]));
        }
        let bytes = (elements / block as u64)
            .checked_mul(kind.type_size() as u64)
            .ok_or_else(|| broken!("tensor {name} has too many elements"))?;
        // The file has the fastest running dimension first.
        dims.reverse();
        if dims.len() == 1 {
            // A vector is one row; blocks do not come apart.
            dims.insert(0, 1);
        }
        Ok(Entry { name, kind, dims, rank: dimensions, offset, bytes })
    }
}

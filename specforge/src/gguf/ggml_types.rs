//! The element types of GGUF: which can be read, and what all of them are called.

use candle_core::quantized::GgmlDType;

/// Every type that can be read: its number in the file, its name, the library's name for it.
const READABLE: [(u32, &str, GgmlDType); 15] = [
    (0, "F32", GgmlDType::F32),
    (1, "F16", GgmlDType::F16),
    (2, "Q4_0", GgmlDType::Q4_0),
    (3, "Q4_1", GgmlDType::Q4_1),
    (6, "Q5_0", GgmlDType::Q5_0),
    (7, "Q5_1", GgmlDType::Q5_1),
    (8, "Q8_0", GgmlDType::Q8_0),
    (9, "Q8_1", GgmlDType::Q8_1),
    (10, "Q2_K", GgmlDType::Q2K),
    (11, "Q3_K", GgmlDType::Q3K),
    (12, "Q4_K", GgmlDType::Q4K),
    (13, "Q5_K", GgmlDType::Q5K),
    (14, "Q6_K", GgmlDType::Q6K),
    (15, "Q8_K", GgmlDType::Q8K),
    (30, "BF16", GgmlDType::BF16),
];

/// Types that exist and cannot be read; named so that a message can name them.
const UNREADABLE: [(u32, &str); 16] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// Number of the type of whole numbers: the ids of a draft's own tokens, and nothing else in the files read here.
const I64: u32 = 27;

/// The type of the elements of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ElementType {
    /// Numbers, perhaps in blocks.
    Numbers(GgmlDType),
    /// Whole numbers of eight bytes.
    I64,
}

impl ElementType {
    /// Elements of a block.
    pub(super) fn block_size(self) -> usize {
        match self {
            Self::Numbers(kind) => kind.block_size(),
            Self::I64 => 1,
        }
    }

    /// Bytes of a block.
    pub(super) fn type_size(self) -> usize {
        match self {
            Self::Numbers(kind) => kind.type_size(),
            Self::I64 => 8,
        }
    }

    /// What it is called.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Numbers(kind) => name(kind),
            Self::I64 => "I64",
        }
    }
}

/// The type with this number, where it can be read.
pub(super) fn by_id(id: u32) -> Option<ElementType> {
    let numbers = READABLE.iter().find(|(number, ..)| *number == id).map(|(.., kind)| ElementType::Numbers(*kind));
    numbers.or((id == I64).then_some(ElementType::I64))
}

/// The number of a type.
pub(super) fn id_of(kind: ElementType) -> u32 {
    match kind {
        ElementType::I64 => I64,
        ElementType::Numbers(kind) => {
            // Every type of the library is in the table.
            READABLE.iter().find(|(.., other)| *other == kind).map_or(0, |(number, ..)| *number)
        }
    }
}

/// What the type with this number is called.
pub(super) fn name_of(id: u32) -> String {
    let readable = READABLE.iter().map(|(number, name, _)| (number, name)).chain([(&I64, &"I64")]);
    let mut all = readable.chain(UNREADABLE.iter().map(|(number, name)| (number, name)));
    all.find(|(number, _)| **number == id).map_or_else(|| format!("number {id}"), |(_, name)| (*name).to_owned())
}

/// What is wrong with a tensor of a type that cannot be read.
pub(super) fn unreadable(name: &str) -> String {
    format!("the element type {name} cannot be read; expected one of {}", known())
}

/// What to do about one.
pub(super) const HINT: &str = "quantise the model to one of these types, or use the original";

/// What a readable type is called.
pub(super) fn name(kind: GgmlDType) -> &'static str {
    READABLE.iter().find(|(.., other)| *other == kind).map_or("unknown", |(_, name, _)| name)
}

/// All readable types, for messages.
fn known() -> String {
    READABLE.map(|(_, name, _)| name).join(", ")
}

#[cfg(test)]
pub(super) fn all_readable() -> impl Iterator<Item = (u32, GgmlDType)> {
    READABLE.into_iter().map(|(id, _, kind)| (id, kind))
}

//! Data.
/// A batch.
#[derive(Debug, Clone, Default)]
pub struct PackedBatch {
    /// a
    pub ids: Vec<i64>,
    /// a
    pub positions: Vec<i64>,
    /// a
    pub supervised: Vec<bool>,
    /// a
    pub lengths: Vec<i64>,
    /// a
    pub documents: Vec<String>,
}

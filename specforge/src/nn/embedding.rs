//! The token embedding: a table, and what its rows are multiplied with.

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// A token embedding.
#[derive(Debug)]
pub struct Embedding {
    /// `[V, H]`
    pub table: Tensor,
    /// Multiplies every row that is looked up (Gemma's square root of `H`, Granite's multiplier); 1 for most. A family whose
    /// reference rounds it to the element type of the weights gives the rounded number.
    pub scale: f64,
}

impl Embedding {
    /// A table `[V, H]` whose rows are taken as they are.
    pub fn plain(table: Tensor) -> Self {
        Self { table, scale: 1.0 }
    }

    /// The same embedding; nothing is copied.
    pub fn share(&self) -> Self {
        Self { table: self.table.shallow_clone(), scale: self.scale }
    }

    /// Embeddings of int64 ids `[..]`: `[.., H]`. An id outside the table is an error.
    pub fn look_up(&self, ids: &Tensor) -> Result<Tensor> {
        let rows = Tensor::f_embedding(&self.table, ids, -1, false, false)?;
        Ok(if self.scale == 1.0 { rows } else { rows * self.scale })
    }

    /// Element type.
    pub fn kind(&self) -> Kind {
        self.table.kind()
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.table.device()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_scaled_and_strange_ids_refused() {
        let table = Tensor::from_slice2(&[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]);
        let ids = Tensor::from_slice(&[2i64, 0]).unsqueeze(0);
        let embedding = Embedding { table: table.shallow_clone(), scale: 0.5 };
        let rows = Vec::<f64>::try_from(embedding.look_up(&ids).unwrap().flatten(0, -1)).unwrap();
        assert_eq!(rows, [2.5, 3.0, 0.5, 1.0]);
        assert!(Embedding::plain(table).look_up(&ids).unwrap().equal(&(embedding.look_up(&ids).unwrap() * 2.0)));
        assert!(embedding.look_up(&(ids + 1)).is_err());
    }
}

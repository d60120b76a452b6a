//! `pytorch_model.bin`, as SafeAILab publishes its drafts: a zip archive with a pickled table of tensors.
//!
//! A pickle is a program. `vocab` reads the vocabulary's tables with an interpreter that knows nothing but tables of
//! tensors and refuses everything else; only a file that passes it is given to candle-core, which reads the weights and
//! knows no booleans.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;
use candle_core::pickle::PthTensors;
use tch::{Kind, Tensor};

use super::{D2T, T2D, trained_name};
use crate::error::{Error, Result, foreign};
use crate::vocab::VocabFile;

pub(super) const FILE: &str = "pytorch_model.bin";

/// Every tensor of a file, by the names of training. Sizes are compared with the file before anything is allocated.
pub(super) fn tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let failed = |problem: String| Error::bad_file(path, format!("is no whole torch file: {problem}"));
    let map = VocabFile::read(path)?.map;
    let mut tensors = BTreeMap::from([
        (D2T.to_owned(), Tensor::from_slice(&map.d2t())),
        (T2D.to_owned(), Tensor::from_slice(&map.t2d())),
    ]);
    let file = foreign::answer(|| PthTensors::new(path, None)).map_err(failed)?;
    // Tensors lie in the archive as they are, two bytes a number or more: none is longer than the file.
    let most = std::fs::metadata(path).map_err(Error::io("read", path))?.len() / 2;
    for (name, info) in file.tensor_infos().iter().filter(|(name, _)| ![D2T, T2D].contains(&name.as_str())) {
        let size: Vec<i64> = info.layout.dims().iter().map(|&size| size as i64).collect();
        let elements = size.iter().try_fold(1, |product: i64, &size| product.checked_mul(size));
        if !elements.is_some_and(|elements| u64::try_from(elements).is_ok_and(|elements| elements <= most)) {
            return Err(Error::bad_file(path, format!("`{name}` {size:?} is larger than the file")));
        }
        let kind = match info.dtype {
            DType::F32 => Kind::Float,
            DType::F16 => Kind::Half,
            DType::BF16 => Kind::BFloat16,
            other => {
                let problem = format!("`{name}`: expected a floating-point type, got {other:?}");
                return Err(Error::bad_file(path, problem));
            }
        };
        let values = foreign::answer(|| file.get(name)).map_err(failed)?;
        let Some(values) = values else { continue };
        // float32 holds every value of the two shorter types.
        let values = foreign::answer(|| values.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>());
        let values = values.map_err(failed)?;
        if let Some(place) = values.iter().position(|value| !value.is_finite()) {
            let problem = format!("`{name}`: expected finite numbers, element {place} is {}", values[place]);
            return Err(Error::bad_file(path, problem));
        }
        let value = Tensor::f_from_slice(&values)?.f_view(size.as_slice())?.f_to_kind(kind)?;
        if tensors.insert(trained_name(name), value).is_some() {
            return Err(Error::bad_file(path, format!("holds `{}` under two names", trained_name(name))));
        }
    }
    Ok(tensors)
}

//! Sums of losses, as they stand in a configuration: `"kl"` or `{"ce": 0.1, "tv": 0.9}`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::Tensor;

use super::elementwise::{LkLambda, RowLoss, Rows};
use crate::error::{Error, Result};

/// A weighted sum of losses of a row: a name, or an object of names and factors. `lk_lambda` also takes an object,
/// `{"lk_lambda": {"factor": 1, "scale": 1, "decay": 1}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Compound {
    terms: Vec<(RowLoss, f64)>,
}

impl Default for Compound {
    fn default() -> Self {
        Self::of(RowLoss::Ce)
    }
}

impl Compound {
    /// One loss alone.
    pub fn of(loss: RowLoss) -> Self {
        Self { terms: vec![(loss, 1.0)] }
    }

    /// The losses with their factors.
    pub fn terms(&self) -> &[(RowLoss, f64)] {
        &self.terms
    }

    /// Whether any of them compares with the target's distribution.
    pub fn wants_teacher(&self) -> bool {
        self.terms.iter().any(|(loss, _)| loss.wants_teacher())
    }

    /// Whether any of them goes by a mean over all supervised slots of a batch.
    pub fn wants_mean(&self) -> bool {
        self.terms.iter().any(|(loss, _)| matches!(loss, RowLoss::LkLambda(_)))
    }

    /// `[C]` values for the draft's logits `[C, DV]`, the target's `[C, DV]` and right tokens `[C]`, with a graph. What
    /// `mean_truth` is, [`Rows::values`] says.
    pub fn values(
        &self,
        logits: &Tensor,
        teacher: Option<&Tensor>,
        labels: &Tensor,
        mean_truth: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.of_rows(&Rows::new(logits, teacher, labels)?, mean_truth)
    }

    /// The same of rows that are there.
    pub fn of_rows(&self, rows: &Rows, mean_truth: Option<&Tensor>) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for &(loss, factor) in self.terms.iter().filter(|(_, factor)| *factor != 0.0) {
            let values = rows.values(loss, mean_truth)?;
            let values = if factor == 1.0 { values } else { values * factor };
            sum = Some(match sum {
                Some(sum) => sum + values,
                None => values,
            });
        }
        sum.ok_or_else(|| Error::Failed("a loss of no terms: expected at least one factor above 0".to_owned()))
    }
}

fn expected() -> String {
    let names: Vec<&str> = RowLoss::NAMES.iter().map(|(name, _)| *name).collect();
    format!("expected one of {}", names.join(", "))
}

/// A factor, or what `lk_lambda` has instead.
fn term(name: &str, value: &Value) -> Result<(RowLoss, f64), String> {
    let loss = RowLoss::named(name).ok_or_else(|| format!("{}, got `{name}`", expected()))?;
    let number = |value: &Value, what: &str| match value.as_f64() {
        Some(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err(format!("{what}: expected 0 or a positive number, got {value}")),
    };
    let Value::Object(parts) = value else {
        return Ok((loss, number(value, &format!("factor of `{name}`"))?));
    };
    let RowLoss::LkLambda(mut lambda) = loss else {
        return Err(format!("factor of `{name}`: expected a number, got {value}"));
    };
    let mut factor = 1.0;
    for (key, value) in parts {
        let place = match key.as_str() {
            "factor" => &mut factor,
            "scale" => &mut lambda.scale,
            "decay" => &mut lambda.decay,
            _ => return Err(format!("`{name}`: expected the keys factor, scale and decay, got `{key}`")),
        };
        *place = number(value, &format!("`{key}` of `{name}`"))?;
    }
    Ok((RowLoss::LkLambda(lambda), factor))
}

impl TryFrom<Value> for Compound {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let terms = match &value {
            Value::String(name) => vec![term(name, &Value::from(1.0))?],
            Value::Object(parts) => parts.iter().map(|(name, value)| term(name, value)).collect::<Result<_, _>>()?,
            _ => return Err(format!("{}, or an object of such names and factors; got {value}", expected())),
        };
        for (index, (loss, _)) in terms.iter().enumerate() {
            if terms[..index].iter().any(|(other, _)| other.name() == loss.name()) {
                return Err(format!("`{}` stands twice; give it one factor", loss.name()));
            }
        }
        if terms.iter().all(|(_, factor)| *factor == 0.0) {
            return Err(format!("no loss has a factor above 0, so nothing would be trained; {}", expected()));
        }
        Ok(Self { terms })
    }
}

impl From<Compound> for Value {
    fn from(compound: Compound) -> Self {
        let plain = |loss: RowLoss| !matches!(loss, RowLoss::LkLambda(lambda) if lambda != LkLambda::default());
        if let [(loss, 1.0)] = compound.terms[..]
            && plain(loss)
        {
            return Self::from(loss.name());
        }
        let value = |(loss, factor): &(RowLoss, f64)| match loss {
            RowLoss::LkLambda(LkLambda { scale, decay }) if !plain(*loss) => {
                serde_json::json!({"factor": factor, "scale": scale, "decay": decay})
            }
            _ => Self::from(*factor),
        };
        let named = compound.terms.iter().map(|term| (term.0.name().to_owned(), value(term)));
        Self::Object(named.collect::<Map<_, _>>())
    }
}

//! Kinds of block drafters, and what trainers and engines call them.

use serde_json::Value;

/// A kind of block drafter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    /// DFlash: the backbone alone.
    Dflash,
    /// DFlash with convolutions and a selector of candidates.
    Dflash2,
    /// A Markov head, and mostly a confidence head.
    Dspark,
    /// A scorer of candidates.
    Lilicorr,
    /// A refiner of whole blocks.
    Xpress,
    /// A recurrent correction.
    Domino,
}

/// How config.json and tensors of a folder are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// z-lab's: Qwen3's keys, and `dflash_config` beside them.
    Zlab,
    /// That of vllm-project/speculators.
    Speculators,
}

impl Method {
    /// Every kind.
    pub const ALL: [Method; 6] =
        [Method::Dflash, Method::Dflash2, Method::Dspark, Method::Lilicorr, Method::Xpress, Method::Domino];

    /// Value of `draft.algorithm`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dflash => "dflash",
            Self::Dflash2 => "dflash2",
            Self::Dspark => "dspark",
            Self::Lilicorr => "lilicorr",
            Self::Xpress => "xpress",
            Self::Domino => "domino",
        }
    }

    /// The kind with this value of `draft.algorithm`.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }

    /// What engines build it by.
    pub(super) fn architecture(self) -> &'static str {
        match self {
            Self::Dflash | Self::Domino => "DFlashDraftModel",
            Self::Dflash2 => "DFlash2DraftModel",
            Self::Dspark => "Qwen3DSparkModel",
            Self::Lilicorr => "LiLiCorrDraftModel",
            Self::Xpress => "Qwen3XPressModel",
        }
    }

    /// The architecture that speculators writes, where it trains this kind.
    pub(super) fn speculators_architecture(self) -> Option<&'static str> {
        match self {
            Self::Dflash => Some("DFlashSpeculator"),
            Self::Dflash2 => Some("DFlash2DraftModel"),
            Self::Dspark => Some("DSparkSpeculator"),
            Self::Xpress => Some("XPressSpeculator"),
            Self::Lilicorr | Self::Domino => None,
        }
    }

    /// Whether rows predict the token behind them unless a folder says otherwise.
    pub(super) fn shifts(self) -> bool {
        // speculators' own default too; vLLM takes the other one there, which `engines` knows.
        self == Self::Dspark
    }
}

/// Kind and layout of a folder by its config.json; nothing where it is no block drafter.
pub(super) fn of(config: &Value) -> Option<(Layout, Method)> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    if let Some(kind) = config.get("speculators_model_type") {
        let method = kind.as_str().and_then(Method::named)?;
        return method.speculators_architecture().map(|_| (Layout::Speculators, method));
    }
    let projector =
        text(config.pointer("/dflash_config/projector_type")).or_else(|| text(config.get("projector_type")));
    let names = config.get("architectures").and_then(Value::as_array)?;
    let method = names.iter().filter_map(Value::as_str).find_map(|name| match (name, projector.as_deref()) {
        // ModelOpt's trainer calls its DSpark this.
        ("DFlashDraftModel", Some("dspark")) => Some(Method::Dspark),
        ("DFlashDraftModel", Some("domino")) => Some(Method::Domino),
        ("DFlashDraftModel" | "MuseGlimmerAssistantModel", _) => Some(Method::Dflash),
        ("DFlash2DraftModel" | "DFlash2BeamDraftModel" | "MiniMaxDFlash2DraftModel", _) => Some(Method::Dflash2),
        ("Qwen3DSparkModel", _) => Some(Method::Dspark),
        // vLLM's DeepSeek-V4 has the name as well, with other keys.
        ("DSparkDraftModel", _) if config.get("dspark_markov_rank").is_none() => Some(Method::Dspark),
        ("LiLiCorrDraftModel", _) => Some(Method::Lilicorr),
        ("Qwen3XPressModel" | "DFlashQwen3XPressModel", _) => Some(Method::Xpress),
        _ => None,
    })?;
    Some((Layout::Zlab, method))
}

//! Mathematics of transformer layers. No model names here.

//! Documents that are the same as another: of the same conversation's words, with the same tokens trained.

use std::collections::HashMap;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::super::cache::TokenCache;

/// More of the most frequent duplicates are counted, not kept.
const KEPT: usize = 20;

/// Documents that are the same as another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Duplicates {
    /// Documents that were there before.
    pub documents: usize,
    /// Share of all.
    pub share: f64,
    /// Different contents among them.
    pub contents: usize,
    /// Those that are there most often.
    pub most: Vec<Repeated>,
}

/// A document that is there several times.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Repeated {
    /// How often.
    pub count: usize,
    /// Names of the first two.
    pub ids: [String; 2],
}

impl Duplicates {
    /// Of all documents of a cache.
    pub fn of(cache: &TokenCache) -> Self {
        let mut places: HashMap<(u64, [u8; 32]), Vec<usize>> = HashMap::with_capacity(cache.len());
        for index in 0..cache.len() {
            let document = cache.document(index);
            let mut hash = Sha256::new();
            document.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
            hash.update(document.supervised);
            places.entry((cache.conversation_key(index), hash.finalize().into())).or_default().push(index);
        }
        let mut repeated: Vec<Vec<usize>> = places.into_values().filter(|places| places.len() > 1).collect();
        repeated.sort_by_key(|places| (std::cmp::Reverse(places.len()), places[0]));
        let documents = repeated.iter().map(|places| places.len() - 1).sum();
        let most = repeated.iter().take(KEPT).map(|places| Repeated {
            count: places.len(),
            ids: [places[0], places[1]].map(|index| cache.document(index).id.to_owned()),
        });
        Self {
            documents,
            share: documents as f64 / cache.len().max(1) as f64,
            contents: repeated.len(),
            most: most.collect(),
        }
    }
}

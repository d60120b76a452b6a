//! Keyed noise against plain 64-bit arithmetic in another language: bits, uniform numbers and Gumbel noise of single keys and
//! of whole rows.
//!
//! File layout: `in.seed_bits`, `in.domain`, `in.pos`, `in.v` `[n]` (unsigned numbers as the bits of int64), `in.row.J` =
//! `[seed, domain, pos, count]`; `out.hash_bits`, `out.u`, `out.g`, `out.row.J`.

use std::path::Path;

use specforge::nn::noise;
use tch::{Device, Kind, Tensor};

use super::Golden;
use super::var::{near, same};

/// Checks one file and says what was compared.
pub fn check(path: &Path) -> Result<String, String> {
    let golden = Golden::open(path)?;
    let [seeds, domains, positions, tokens] =
        ["in.seed_bits", "in.domain", "in.pos", "in.v"].map(|name| golden.integers(name));
    let keys = seeds?.into_iter().zip(domains?).zip(positions?.into_iter().zip(tokens?));
    let keys: Vec<[u64; 4]> = keys
        .map(|((seed, domain), (position, token))| [seed, domain, position, token].map(|bits| bits as u64))
        .collect();
    let bits: Vec<i64> = keys.iter().map(|&[s, d, p, v]| noise::keyed_bits(s, d, p, v) as i64).collect();
    same("out.hash_bits", &Tensor::from_slice(&bits), &golden)?;
    let uniform: Vec<f64> = bits.iter().map(|&bits| noise::uniform_of(bits as u64)).collect();
    same("out.u", &Tensor::from_slice(&uniform), &golden)?;
    let gumbel: Vec<f64> = keys.iter().map(|&[s, d, p, v]| noise::keyed_gumbel(s, d, p, v)).collect();
    near("out.g", &Tensor::from_slice(&gumbel), &golden, 1e-12)?;
    let mut rows = 0;
    while golden.has(&format!("in.row.{rows}")) {
        let row = golden.integers(&format!("in.row.{rows}"))?;
        let &[seed, domain, position, count] = row.as_slice() else { return Err(format!("in.row.{rows}: {row:?}")) };
        let (seed, domain, position) = (seed as u64, domain as u64, position as u64);
        let name = format!("out.row.{rows}");
        near(&name, &noise::gumbel_row(seed, domain, position, count), &golden, 1e-12)?;
        let tokens = Tensor::arange(count, (Kind::Int64, Device::Cpu));
        near(&name, &noise::gumbel_rows(domain, &[(seed, position)], &tokens).get(0), &golden, 1e-12)?;
        rows += 1;
    }
    Ok(format!("{} keys, {rows} rows", keys.len()))
}

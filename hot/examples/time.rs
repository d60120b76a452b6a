//! Times the loops: `cargo run -p specforge-hot --example time`. With `--config profile.dev.package.specforge-hot.opt-level=1`
//! they are compiled as the rest of the program is.

use std::hint::black_box;
use std::time::Instant;

use specforge_hot::{float8, noise, rows};

const VOCABULARY: usize = 128_256;

/// The best of some runs, in milliseconds.
fn best(name: &str, mut run: impl FnMut()) {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64() * 1e3
    };
    println!("{name:<42} {:>9.3} ms", (0..15).map(time).fold(f64::INFINITY, f64::min));
}

fn main() {
    let logits: Vec<f64> = (0..VOCABULARY).map(|token| noise::keyed_gumbel(1, 2, 3, token as u64) * 2.0).collect();
    let probabilities = rows::softmax(&logits);
    let states: Vec<f32> = noise::normal(1 << 22, 1.0, 4, 5);
    let (mut codes, mut scales, mut decoded) = (Vec::new(), Vec::new(), vec![0.0; states.len()]);
    float8::encode(&states, 4096, &mut codes, &mut scales);
    best("noise of a vocabulary", || drop(black_box(noise::gumbel_of_all(1, 0, 9, VOCABULARY as u64))));
    best("keyed choice of a row", || {
        black_box(noise::gumbel_argmax(1, 0, 9, &logits, 0.7));
    });
    best("ten best of a row with noise", || drop(black_box(noise::gumbel_top((1, 0, 9), None, &logits, 10))));
    best("softmax of a row", || drop(black_box(rows::softmax(&logits))));
    best("top-k 50 of a row", || rows::keep_largest(&mut black_box(logits.clone()), 50));
    best("top-p 0.95 of a row", || rows::keep_nucleus(&mut black_box(logits.clone()), 0.95));
    best("residual of a rejected guess", || {
        let mut left = probabilities.clone();
        black_box(rows::subtract(&mut left, &probabilities));
        rows::normalise(black_box(&mut left));
    });
    best("4M normal numbers", || drop(black_box(noise::normal(1 << 22, 1.0, 4, 5))));
    best("4M numbers to float8", || {
        codes.clear();
        scales.clear();
        float8::encode(black_box(&states), 4096, &mut codes, &mut scales);
    });
    float8::encode(&states, 4096, &mut codes, &mut scales);
    best("4M numbers from float8", || {
        float8::decode(&codes[..states.len()], &scales[..1024], 4096, black_box(&mut decoded))
    });
}

//! Two traces, compared with and without their target.
#![no_main]

fn read() -> specforge::error::Result<()> {
    specforge_fuzz::all(&[
        &["compare", "a.trace", "b.trace", "--json"],
        &["compare", "b.trace", "a.trace"],
        &["compare", "a.trace", "b.trace", "--target", "model", "--device", "cpu"],
    ])
}

specforge_fuzz::target!(&["a.trace", "a.trace.rows"], read);

pub mod medusa;

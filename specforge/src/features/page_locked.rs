//! Page-locked memory through which states travel to a GPU: one piece is filled while the device still takes what is in
//! another.

use tch::{Device, Kind, Tensor};

use crate::device;
use crate::error::Result;
use crate::streams::{Mark, Stream};

/// Pieces: one to be filled, and one that the device takes.
const PIECES: usize = 2;

/// Pieces of memory that are used in turn.
#[derive(Debug)]
pub(super) struct Ring {
    device: Device,
    pieces: [Option<Piece>; PIECES],
    next: usize,
}

#[derive(Debug)]
struct Piece {
    /// `[bytes]`
    memory: Tensor,
    /// When the device has taken what was put there last.
    taken: Option<Mark>,
}

impl Ring {
    /// For states on their way to this device. It has no memory yet.
    pub(super) fn new(device: Device) -> Self {
        Self { device, pieces: [None, None], next: 0 }
    }

    /// Hands out so many bytes, which the device has done with, and notes what `send` asks of the device meanwhile.
    pub(super) fn with<T>(&mut self, bytes: usize, send: impl FnOnce(&Tensor) -> Result<T>) -> Result<T> {
        let device = self.device;
        let place = &mut self.pieces[self.next];
        self.next = (self.next + 1) % PIECES;
        if let Some(taken) = place.as_mut().and_then(|piece| piece.taken.take()) {
            taken.wait()?;
        }
        let piece = match place.take().filter(|piece| piece.memory.numel() >= bytes) {
            Some(piece) => place.insert(piece),
            None => {
                let memory = Tensor::f_empty([bytes as i64], (Kind::Uint8, Device::Cpu))?;
                place.insert(Piece { memory: device::page_locked(&memory, device), taken: None })
            }
        };
        let sent = send(&piece.memory.f_narrow(0, 0, bytes as i64)?);
        // Whatever came of it: a part may be on its way.
        piece.taken = Stream::current(device)?.map(Stream::mark).transpose()?;
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_take_turns_and_grow() {
        let mut ring = Ring::new(Device::Cpu);
        let mut at = |bytes| ring.with(bytes, |memory| Ok((memory.data_ptr() as usize, memory.numel()))).unwrap();
        let (first, second) = (at(100), at(100));
        assert!(first.0 != second.0 && first.1 == 100);
        assert_eq!((at(60), at(100)), ((first.0, 60), second));
        assert_eq!(at(200).1, 200);
        assert_eq!(at(50), (second.0, 50));
    }
}

//! Streams of a CUDA device: queues of work that run beside each other (`csrc/streams.cpp`).
//!
//! Work of a thread goes to one stream, by itself the same for all threads. A thread that works ahead has one of its own;
//! a [`Mark`] says how far it is, and others wait for that mark on the device, while their host goes on. Without such a
//! device there are no streams, and every question here has the answer `None`.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::NonNull;

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result};
use crate::shim::checked;

unsafe extern "C" {
    fn specforge_stream_beside(device: i32, stream: *mut i64, error: *mut c_char, error_size: usize) -> c_int;
    fn specforge_stream_current(device: i32, stream: *mut i64, error: *mut c_char, error_size: usize) -> c_int;
    fn specforge_stream_handle(
        device: i32,
        stream: i64,
        handle: *mut *mut c_void,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_stream_enter(device: i32, stream: i64, error: *mut c_char, error_size: usize) -> c_int;
    fn specforge_event_record(
        device: i32,
        stream: i64,
        event: *mut *mut c_void,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_event_block(
        event: *const c_void,
        device: i32,
        stream: i64,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn specforge_event_synchronize(event: *const c_void, error: *mut c_char, error_size: usize) -> c_int;
    fn specforge_event_free(event: *mut c_void);
    fn specforge_stream_uses(
        tensor: *const C_tensor,
        device: i32,
        stream: i64,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
}

/// A stream of a CUDA device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    device: i32,
    number: i64,
}

/// A place in the work of a stream.
#[derive(Debug)]
pub struct Mark(NonNull<c_void>);

// SAFETY: an event belongs to no thread; it is only ever used by the one that has it.
unsafe impl Send for Mark {}

fn index(device: Device) -> Option<i32> {
    match device {
        Device::Cuda(index) => i32::try_from(index).ok(),
        _ => None,
    }
}

impl Stream {
    /// The stream that this thread's work goes to. `None` where the device has no streams.
    pub fn current(device: Device) -> Result<Option<Self>> {
        Self::asked(device, specforge_stream_current)
    }

    /// A stream beside that one. `None` where the device has no streams.
    pub fn beside(device: Device) -> Result<Option<Self>> {
        Self::asked(device, specforge_stream_beside)
    }

    fn asked(
        device: Device,
        ask: unsafe extern "C" fn(i32, *mut i64, *mut c_char, usize) -> c_int,
    ) -> Result<Option<Self>> {
        let Some(device) = index(device) else { return Ok(None) };
        let mut number = 0;
        // SAFETY: the number and the message buffer outlive the call.
        checked(|error, error_size| unsafe { ask(device, &raw mut number, error, error_size) })?;
        Ok(Some(Self { device, number }))
    }

    /// What the device's driver calls it. It stays libtorch's.
    pub fn handle(self) -> Result<*mut c_void> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer and the message buffer outlive the call.
        checked(|error, error_size| unsafe {
            specforge_stream_handle(self.device, self.number, &raw mut handle, error, error_size)
        })?;
        Ok(handle)
    }

    /// From now on this thread's work goes here.
    pub fn enter(self) -> Result<()> {
        // SAFETY: the message buffer outlives the call.
        checked(|error, error_size| unsafe { specforge_stream_enter(self.device, self.number, error, error_size) })
    }

    /// The place behind everything that was asked of it so far.
    pub fn mark(self) -> Result<Mark> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the pointer and the message buffer outlive the call.
        checked(|error, error_size| unsafe {
            specforge_event_record(self.device, self.number, &raw mut event, error, error_size)
        })?;
        let event = NonNull::new(event);
        event.map(Mark).ok_or_else(|| Error::Torch("a recorded event is not there".to_owned()))
    }

    /// What is asked of this stream from now on comes after a place in another one. Nobody waits here.
    pub fn follow(self, mark: &Mark) -> Result<()> {
        // SAFETY: the event lives as long as its mark, and the message buffer outlives the call.
        checked(|error, error_size| unsafe {
            specforge_event_block(mark.0.as_ptr(), self.device, self.number, error, error_size)
        })
    }

    /// This stream uses a tensor that another one made: its memory must not be given out again before that is done.
    pub fn uses(self, tensor: &Tensor) -> Result<()> {
        // SAFETY: the tensor and the message buffer outlive the call.
        checked(|error, error_size| unsafe {
            specforge_stream_uses(tensor.as_ptr(), self.device, self.number, error, error_size)
        })
    }
}

impl Mark {
    /// Waits until the device has come so far.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event lives as long as its mark, and the message buffer outlives the call.
        checked(|error, error_size| unsafe { specforge_event_synchronize(self.0.as_ptr(), error, error_size) })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: the event is this mark's own and freed once.
        unsafe { specforge_event_free(self.0.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::device::{self, CudaState};

    #[test]
    fn a_processor_has_no_streams() {
        assert_eq!(Stream::current(Device::Cpu).unwrap(), None);
        assert_eq!(Stream::beside(Device::Cpu).unwrap(), None);
        // Nor has a device that is not there.
        if matches!(device::cuda(), CudaState::Unusable(_)) {
            assert!(Stream::current(Device::Cuda(0)).is_err());
        }
    }

    /// What one stream made is whole where another one follows its mark.
    #[test]
    fn a_stream_follows_another() {
        let CudaState::Usable(_) = device::cuda() else { return };
        let device = Device::Cuda(0);
        let here = Stream::current(device).unwrap().unwrap();
        let made = std::thread::spawn(move || {
            let own = Stream::beside(device).unwrap().unwrap();
            own.enter().unwrap();
            assert_eq!(Stream::current(device).unwrap(), Some(own));
            let mut sum = Tensor::zeros([1 << 20], (Kind::Float, device));
            (0..100).for_each(|_| sum += 1.0);
            (sum, own.mark().unwrap())
        });
        let (sum, mark) = made.join().unwrap();
        here.follow(&mark).unwrap();
        here.uses(&sum).unwrap();
        assert_eq!(sum.sum(Kind::Double).double_value(&[]), 100.0 * f64::from(1 << 20));
        mark.wait().unwrap();
    }
}

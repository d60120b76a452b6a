//! Collectives over the ranks of a run: `c10d::ProcessGroup` over Gloo (host memory) and NCCL (CUDA).
//!
//! Where a tensor is decides who carries it. A failure over Gloo is an error of the call. A collective over NCCL is queued
//! on the device, and the call returns at once: what follows on the device waits for it, the host does not. So nothing
//! can be returned when a peer is gone; libtorch's watchdog notices, at the latest when the timeout has passed, and ends
//! the process with a message and exit code 1. The device waits until then: nothing is computed with what never came.

use std::ffi::{CString, c_char, c_int};
use std::net::IpAddr;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::c10d::{self, CGroup};
use super::nccl;
use super::store::{Store, milliseconds};
use crate::device::{self, CudaState};
use crate::error::{Error, Result};
use crate::shim::checked;

/// How values of the ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

/// The ranks of a run. Every rank calls the same collectives in the same order, whatever its data; a call returns when
/// this rank's part is done (on a CUDA device: queued), or with an error when a peer is gone or the group's timeout has
/// passed.
#[derive(Debug)]
pub struct ProcessGroup {
    rank: usize,
    world_size: usize,
    /// Null for a process on its own.
    raw: *mut CGroup,
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by the shim, and freed once.
            unsafe { c10d::specforge_group_free(self.raw) }
        }
    }
}

impl ProcessGroup {
    /// A process on its own, for those who want a reference to it.
    pub const SINGLE: &'static Self = &Self::single();

    /// A process on its own: every collective is the identity.
    pub const fn single() -> Self {
        Self { rank: 0, world_size: 1, raw: std::ptr::null_mut() }
    }

    /// Meets the other ranks through `store`, whose keys must be this group's alone. `address` is this machine's, as the
    /// peers reach it. Returns when all are there.
    pub fn gloo(store: &Store, rank: usize, world_size: usize, address: IpAddr, timeout: Duration) -> Result<Self> {
        let text = CString::new(address.to_string()).map_err(|error| Error::Failed(error.to_string()))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live store; text and place outlive the call.
        checked(|error, size| unsafe {
            let (rank, world_size) = (rank as c_int, world_size as c_int);
            let timeout = milliseconds(timeout);
            c10d::specforge_group_gloo(store.raw(), rank, world_size, text.as_ptr(), timeout, &raw mut raw, error, size)
        })
        .map_err(|error| failed(rank, "meeting the other ranks", &error))?;
        let group = Self { rank, world_size, raw };
        // Others may still be connecting, and a rank that has nothing to do and leaves now would spoil that for all.
        group.barrier()?;
        Ok(group)
    }

    /// From now on NCCL carries tensors of `device`, which is CUDA and this rank's alone. All ranks must call it; `store`
    /// is the group's. A collective that takes longer than `timeout` ends the process.
    pub fn add_nccl(&mut self, store: &Store, device: Device, timeout: Duration) -> Result<()> {
        let unusable = |reason: &str| Error::Failed(format!("NCCL's process group cannot be used: {reason}"));
        let nccl = nccl::opened().map_err(unusable)?;
        let count = match device::cuda() {
            CudaState::Usable(count) => *count,
            CudaState::Unusable(reason) => return Err(unusable(&format!("CUDA is not usable: {reason}"))),
        };
        let index = match device {
            Device::Cuda(index) if index < count => index as c_int,
            other => {
                let name = device::name(other);
                return Err(unusable(&format!("expected one of {count} CUDA devices, numbered from 0, got {name}")));
            }
        };
        if self.raw.is_null() {
            return Err(unusable("a process on its own has no group to add it to"));
        }
        // NCCL waits for its peers without a limit, so first all of them have to be here.
        self.barrier()?;
        // SAFETY: a live group and a live store, as the pointers that the library expects.
        checked(|error, size| unsafe {
            let (group, store) = (c10d::specforge_group_inner(self.raw), c10d::specforge_store_inner(store.raw()));
            (nccl.add)(group, store, index, milliseconds(timeout), error, size)
        })
        .map_err(|error| failed(self.rank, "meeting the other ranks over NCCL", &error))
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many processes there are.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Whether this is the rank that writes files and talks to people.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Whether there is a process group behind this at all; one of a single rank counts.
    pub fn is_distributed(&self) -> bool {
        !self.raw.is_null()
    }

    /// Combines a tensor over the ranks, in place.
    pub fn all_reduce(&self, tensor: &Tensor, operation: ReduceOp) -> Result<()> {
        let operation = match operation {
            ReduceOp::Sum => 0,
            ReduceOp::Max => 1,
            ReduceOp::Min => 2,
        };
        // SAFETY: a live group and a live tensor.
        self.collective("all-reduce", |group, error, size| unsafe {
            c10d::specforge_group_all_reduce(group, tensor.as_ptr(), operation, error, size)
        })
    }

    /// Every rank's tensor becomes that of `root`.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<()> {
        // SAFETY: a live group and a live tensor.
        self.collective("broadcast", |group, error, size| unsafe {
            c10d::specforge_group_broadcast(group, tensor.as_ptr(), root as c_int, error, size)
        })
    }

    /// `whole [W * n, ..]` receives every rank's `part [n, ..]`, in order of rank.
    pub fn all_gather(&self, whole: &Tensor, part: &Tensor) -> Result<()> {
        if !self.is_distributed() {
            whole.shallow_clone().f_copy_(part)?;
        }
        // SAFETY: a live group and two live tensors; libtorch checks their sizes.
        self.collective("all-gather", |group, error, size| unsafe {
            c10d::specforge_group_all_gather(group, whole.as_ptr(), part.as_ptr(), error, size)
        })
    }

    /// `part [n, ..]` receives this rank's piece of the sum of every rank's `whole [W * n, ..]`.
    pub fn reduce_scatter(&self, part: &Tensor, whole: &Tensor) -> Result<()> {
        if !self.is_distributed() {
            part.shallow_clone().f_copy_(whole)?;
        }
        // SAFETY: a live group and two live tensors; libtorch checks their sizes.
        self.collective("reduce-scatter", |group, error, size| unsafe {
            c10d::specforge_group_reduce_scatter(group, part.as_ptr(), whole.as_ptr(), error, size)
        })
    }

    /// Returns when every rank has called it.
    pub fn barrier(&self) -> Result<()> {
        // SAFETY: a live group.
        self.collective("barrier", |group, error, size| unsafe { c10d::specforge_group_barrier(group, error, size) })
    }

    /// The bytes of `root` on every rank.
    pub fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>> {
        if !self.is_distributed() {
            return Ok(bytes.to_vec());
        }
        let length = Tensor::from(bytes.len() as i64);
        self.broadcast(&length, root)?;
        let length = length.int64_value(&[]);
        let buffer = match self.rank == root {
            true => Tensor::from_slice(bytes),
            false => Tensor::f_zeros([length], (Kind::Uint8, Device::Cpu))?,
        };
        if length > 0 {
            self.broadcast(&buffer, root)?;
        }
        Ok(Vec::try_from(buffer)?)
    }

    /// Every rank's bytes, in order of rank.
    pub fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        (0..self.world_size).map(|root| self.broadcast_bytes(bytes, root)).collect()
    }

    fn collective(
        &self,
        name: &'static str,
        call: impl FnOnce(*const CGroup, *mut c_char, usize) -> c_int,
    ) -> Result<()> {
        if self.raw.is_null() {
            return Ok(());
        }
        checked(|error, size| call(self.raw, error, size)).map_err(|error| failed(self.rank, name, &error))
    }

    pub(super) fn raw(&self) -> *const CGroup {
        self.raw
    }
}

/// A collective fails because a peer is gone or late, hardly ever by itself.
pub(super) fn failed(rank: usize, operation: &'static str, error: &Error) -> Error {
    let problem = match error {
        Error::Torch(text) => text.lines().next().unwrap_or_default().to_owned(),
        other => other.to_string(),
    };
    Error::Peer { rank, operation, problem }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    use super::*;

    /// Far longer than anything takes, on a busy machine too.
    pub(crate) const TIMEOUT: Duration = Duration::from_secs(240);
    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// Runs `body` on `world_size` ranks, a thread each, and returns what they returned in order of rank.
    pub(crate) fn on_ranks<T: Send>(world_size: usize, body: impl Fn(&ProcessGroup) -> T + Sync) -> Vec<T> {
        let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let _server = Store::host("127.0.0.1", listener, TIMEOUT).unwrap();
        let body = &body;
        let run = move |rank| {
            let store = Store::connect("127.0.0.1", port, TIMEOUT).unwrap();
            body(&ProcessGroup::gloo(&store, rank, world_size, LOOPBACK, TIMEOUT).unwrap())
        };
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || run(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn numbers(values: &[f64]) -> Tensor {
        Tensor::from_slice(values)
    }

    fn list(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn nccl_that_cannot_be_used_says_so() {
        let store = Store::host("127.0.0.1", TcpListener::bind((LOOPBACK, 0)).unwrap(), TIMEOUT).unwrap();
        let error = ProcessGroup::single().add_nccl(&store, Device::Cpu, TIMEOUT).unwrap_err().to_string();
        assert!(error.starts_with("NCCL's process group cannot be used: "), "{error}");
    }

    #[test]
    fn collectives_do_what_their_names_say() {
        for world_size in [1, 2, 3] {
            let all = on_ranks(world_size, |group| {
                let rank = group.rank() as f64;
                let sum = numbers(&[rank, 1.0]);
                group.all_reduce(&sum, ReduceOp::Sum).unwrap();
                let (largest, smallest) = (numbers(&[rank]), numbers(&[rank]));
                group.all_reduce(&largest, ReduceOp::Max).unwrap();
                group.all_reduce(&smallest, ReduceOp::Min).unwrap();
                let shared = numbers(&[rank + 10.0]);
                group.broadcast(&shared, world_size - 1).unwrap();
                let whole = Tensor::zeros([2 * world_size as i64], (Kind::Double, Device::Cpu));
                group.all_gather(&whole, &numbers(&[rank, -rank])).unwrap();
                let piece = Tensor::zeros([1], (Kind::Double, Device::Cpu));
                let ramp: Vec<f64> = (0..world_size).map(|index| index as f64).collect();
                group.reduce_scatter(&piece, &numbers(&ramp)).unwrap();
                group.barrier().unwrap();
                let bytes = group.broadcast_bytes(format!("from {rank}").as_bytes(), 0).unwrap();
                let every = group.all_gather_bytes(&vec![7u8; group.rank()]).unwrap();
                let numbers = [&sum, &largest, &smallest, &shared, &whole, &piece].map(list);
                (numbers, bytes, every)
            });
            for (rank, (numbers, bytes, every)) in all.into_iter().enumerate() {
                let world = world_size as f64;
                let whole: Vec<f64> = (0..world_size).flat_map(|rank| [rank as f64, -(rank as f64)]).collect();
                let last = world - 1.0;
                let want = [
                    vec![world * last / 2.0, world],
                    vec![last],
                    vec![0.0],
                    vec![last + 10.0],
                    whole,
                    vec![world * rank as f64],
                ];
                assert_eq!(numbers, want, "rank {rank} of {world_size}");
                assert_eq!(bytes, b"from 0");
                assert_eq!(every, (0..world_size).map(|length| vec![7u8; length]).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_process_on_its_own_needs_no_peers() {
        let group = ProcessGroup::single();
        let value = numbers(&[3.0]);
        group.all_reduce(&value, ReduceOp::Sum).unwrap();
        group.broadcast(&value, 0).unwrap();
        group.barrier().unwrap();
        let whole = numbers(&[0.0]);
        group.all_gather(&whole, &value).unwrap();
        assert_eq!((list(&value), list(&whole)), (vec![3.0], vec![3.0]));
        assert_eq!(group.all_gather_bytes(b"x").unwrap(), [b"x"]);
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error() {
        let outcomes = on_ranks(2, |group| match group.rank() {
            0 => Ok(()), // leaves at once
            _ => group.all_reduce(&numbers(&[1.0]), ReduceOp::Sum),
        });
        let error = outcomes[1].as_ref().unwrap_err();
        assert!(matches!(error, Error::Peer { rank: 1, operation: "all-reduce", .. }), "{error}");
    }
}

//! The C ABI of `csrc/c10d.cpp`, and of `csrc/nccl.cpp`, which is a library of its own.

use std::ffi::{c_char, c_int, c_void};

use torch_sys::C_tensor;

/// A store of libtorch.
#[repr(C)]
pub(super) struct CStore {
    _private: [u8; 0],
}

/// A process group of libtorch.
#[repr(C)]
pub(super) struct CGroup {
    _private: [u8; 0],
}

/// A reducer of libtorch.
#[repr(C)]
pub(super) struct CReducer {
    _private: [u8; 0],
}

/// When a bucket was handed to the process group and came back, in nanoseconds of a steady clock.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct CBucketTime {
    pub(super) bytes: i64,
    pub(super) launched: i64,
    pub(super) finished: i64,
}

/// Receives a value of the store.
pub(super) type Receive = extern "C" fn(context: *mut c_void, value: *const u8, length: usize);

/// `specforge_nccl_build`: what the library was built for.
pub(super) type NcclBuild = unsafe extern "C" fn() -> *const c_char;

/// `specforge_group_add_nccl`: takes what [`specforge_group_inner`] and [`specforge_store_inner`] give.
pub(super) type AddNccl = unsafe extern "C" fn(
    group: *mut c_void,
    store: *const c_void,
    device: c_int,
    timeout_ms: i64,
    error: *mut c_char,
    error_size: usize,
) -> c_int;

unsafe extern "C" {
    pub(super) fn specforge_store_host(
        host: *const c_char,
        port: u16,
        listener: c_int,
        timeout_ms: i64,
        output: *mut *mut CStore,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_store_connect(
        host: *const c_char,
        port: u16,
        timeout_ms: i64,
        output: *mut *mut CStore,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_store_prefixed(
        store: *const CStore,
        prefix: *const c_char,
        output: *mut *mut CStore,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_store_clone(
        store: *const CStore,
        output: *mut *mut CStore,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_store_free(store: *mut CStore);
    pub(super) fn specforge_store_set(
        store: *const CStore,
        key: *const c_char,
        value: *const u8,
        length: usize,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_store_get(
        store: *const CStore,
        key: *const c_char,
        receive: Receive,
        context: *mut c_void,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_store_check(
        store: *const CStore,
        key: *const c_char,
        present: *mut bool,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_store_add(
        store: *const CStore,
        key: *const c_char,
        amount: i64,
        total: *mut i64,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;

    pub(super) fn specforge_group_gloo(
        store: *const CStore,
        rank: c_int,
        world_size: c_int,
        address: *const c_char,
        timeout_ms: i64,
        output: *mut *mut CGroup,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_group_inner(group: *mut CGroup) -> *mut c_void;
    pub(super) fn specforge_store_inner(store: *const CStore) -> *const c_void;
    pub(super) fn specforge_group_free(group: *mut CGroup);
    pub(super) fn specforge_group_all_reduce(
        group: *const CGroup,
        tensor: *const C_tensor,
        operation: c_int,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_group_broadcast(
        group: *const CGroup,
        tensor: *const C_tensor,
        root: c_int,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_group_all_gather(
        group: *const CGroup,
        whole: *const C_tensor,
        part: *const C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_group_reduce_scatter(
        group: *const CGroup,
        part: *const C_tensor,
        whole: *const C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_group_barrier(group: *const CGroup, error: *mut c_char, error_size: usize) -> c_int;

    pub(super) fn specforge_reducer_new(
        group: *const CGroup,
        values: *const *const C_tensor,
        count: i64,
        bucket_bytes: i64,
        output: *mut *mut CReducer,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_reducer_free(reducer: *mut CReducer);
    pub(super) fn specforge_reducer_prepare(reducer: *mut CReducer, error: *mut c_char, error_size: usize) -> c_int;
    pub(super) fn specforge_reducer_ready(
        reducer: *mut CReducer,
        index: i64,
        gradient: *const C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_reducer_gradient(
        reducer: *const CReducer,
        index: i64,
        output: *mut *mut C_tensor,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    pub(super) fn specforge_reducer_times(
        reducer: *const CReducer,
        times: *mut CBucketTime,
        capacity: i64,
        count: *mut i64,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
}

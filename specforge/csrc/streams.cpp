// Streams and events of a device, through libtorch's interface for any kind of device: nothing of CUDA is linked.
// A stream is its number. An event is a `c10::Event *` owned by the caller.

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>
#include <memory>

#include "guarded.h"

namespace {

c10::Device device_of(std::int32_t index) {
  return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)};
}

c10::Stream stream_of(std::int32_t device, std::int64_t stream) {
  return c10::Stream(c10::Stream::UNSAFE, device_of(device), stream);
}

c10::impl::VirtualGuardImpl implementation() { return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA); }

}  // namespace

extern "C" {

// A stream beside the one that work goes to by itself.
int specforge_stream_beside(std::int32_t device, std::int64_t *stream, char *error, std::size_t error_size) {
  return guarded([&] { *stream = implementation().getStreamFromGlobalPool(device_of(device), false).id(); }, error,
                 error_size);
}

// The stream that this thread's work goes to.
int specforge_stream_current(std::int32_t device, std::int64_t *stream, char *error, std::size_t error_size) {
  return guarded([&] { *stream = implementation().getStream(device_of(device)).id(); }, error, error_size);
}

// What the device's driver calls a stream.
int specforge_stream_handle(std::int32_t device, std::int64_t stream, void **handle, char *error,
                            std::size_t error_size) {
  return guarded([&] { *handle = stream_of(device, stream).native_handle(); }, error, error_size);
}

// From now on this thread's work goes to this device and stream. A thread begins on device 0, where it would otherwise
// take memory that belongs to another process.
int specforge_stream_enter(std::int32_t device, std::int64_t stream, char *error, std::size_t error_size) {
  return guarded(
      [&] {
        implementation().setDevice(device_of(device));
        implementation().exchangeStream(stream_of(device, stream));
      },
      error, error_size);
}

// An event behind everything that was asked of a stream so far.
int specforge_event_record(std::int32_t device, std::int64_t stream, c10::Event **event, char *error,
                           std::size_t error_size) {
  return guarded(
      [&] {
        auto recorded = std::make_unique<c10::Event>(c10::DeviceType::CUDA);
        recorded->record(stream_of(device, stream));
        *event = recorded.release();
      },
      error, error_size);
}

// What is asked of a stream from now on comes after the event. The host does not wait.
int specforge_event_block(const c10::Event *event, std::int32_t device, std::int64_t stream, char *error,
                          std::size_t error_size) {
  return guarded([&] { event->block(stream_of(device, stream)); }, error, error_size);
}

// The host waits for the event.
int specforge_event_synchronize(const c10::Event *event, char *error, std::size_t error_size) {
  return guarded([&] { event->synchronize(); }, error, error_size);
}

void specforge_event_free(c10::Event *event) { delete event; }

// Memory of a tensor that another stream made is not given out again before this one is done with it.
int specforge_stream_uses(const at::Tensor *tensor, std::int32_t device, std::int64_t stream, char *error,
                          std::size_t error_size) {
  return guarded(
      [&] { implementation().recordDataPtrOnStream(tensor->storage().data_ptr(), stream_of(device, stream)); }, error,
      error_size);
}

}  // extern "C"

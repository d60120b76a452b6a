// How a function behind the C ABI reports: 0, or 1 after writing a message into `error`.

#pragma once

#include <cstddef>
#include <cstring>
#include <exception>

inline void write_error(const char *message, char *error, std::size_t error_size) {
  if (error_size == 0) return;
  std::strncpy(error, message, error_size - 1);
  error[error_size - 1] = '\0';
}

template <typename Body>
int guarded(Body body, char *error, std::size_t error_size) {
  try {
    body();
    return 0;
  } catch (const std::exception &exception) {
    write_error(exception.what(), error, error_size);
  } catch (...) {
    write_error("an unknown C++ exception", error, error_size);
  }
  return 1;
}

// Where C++ ends: no exception leaves, what it says is kept for the thread.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "../influence_fast.h"

namespace influence_fast::c {

int fail(int code, const char* text) noexcept;

// Values that cannot be compared, and rows that are no longer what they were.
struct NotFinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ChangedRows : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// INFLUENCE_FAST_OK once `body` is through.
template <typename Body>
int guarded(const Body& body) noexcept {
  try {
    body();
    return INFLUENCE_FAST_OK;
  } catch (const std::invalid_argument& error) {
    return fail(INFLUENCE_FAST_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return fail(INFLUENCE_FAST_OUT_OF_MEMORY, "out of memory");
  } catch (const std::length_error&) {  // of a container that no memory holds
    return fail(INFLUENCE_FAST_OUT_OF_MEMORY, "out of memory");
  } catch (const NotFinite& error) {
    return fail(INFLUENCE_FAST_NOT_FINITE, error.what());
  } catch (const ChangedRows& error) {
    return fail(INFLUENCE_FAST_CHANGED_ROWS, error.what());
  } catch (const std::exception& error) {
    return fail(INFLUENCE_FAST_FAILED, error.what());
  } catch (...) {
    return fail(INFLUENCE_FAST_FAILED, "unknown error");
  }
}

int threads();

}  // namespace influence_fast::c

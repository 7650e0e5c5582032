// Found instead of the toolkit's header when g++ compiles .cu files for the emulator: see
// tests/simt/simt.h.
#pragma once

#define THAW_EMULATED  // tested in device/ only

#include "simt/atomics.h"
#include "simt/device.h"
#include "simt/host.h"
#include "simt/intrinsics.h"
#include "simt/types.h"

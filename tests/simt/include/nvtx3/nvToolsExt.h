// The innermost open range names the next operation in the emulator's messages and counts.
#pragma once

int nvtxRangePushA(const char* name);
int nvtxRangePop();

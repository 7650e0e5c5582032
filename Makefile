# thaw: build, test, demo. `make help` lists the targets.
CXX ?= g++
BUILD ?= build
ARCH ?= native
OPT ?= -O3
SAN ?=
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 20

FUZZ_FLAGS = -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048

# g++ 12 finds std::string out of its bounds, wrongly, depending on what is inlined.
WARN := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wno-psabi -Werror \
  -Wno-array-bounds -Wno-stringop-overflow
SAN_FLAGS := $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer \
  -fno-sanitize-recover=all)
# -fno-trapping-math: nobody asks for floating-point traps, and without it no loop with a choice in
# it becomes vector code.
COMPILE = $(CXX) -std=c++20 $(OPT) -march=$(ARCH) -fopenmp-simd -fno-trapping-math -pthread -g1 \
  -I. -I$(BUILD) $(WARN) $(SAN_FLAGS) -DDOCTEST_CONFIG_SUPER_FAST_ASSERTS \
  $(CPPFLAGS) $(CXXFLAGS)
LINK = $(CXX) -pthread $(SAN_FLAGS) $(LDFLAGS)
LIBS := -lpcre2-8 -ledit

# Library headers, parsed once for all files with the same flags, and once more with JSON, which costs
# half a second a file: saves 1 to 2 seconds each. clang goes without.
PARSED := $(if $(findstring clang,$(CXX)),,$(BUILD)/parsed)
PARSED_ROOMS := algorithm atomic chrono cmath filesystem functional iostream map memory optional set \
  span sstream string thread variant vector
PARSED_TESTS := doctest/doctest.h $(PARSED_ROOMS)
KIND := rooms
WITH = $(PARSED:%=-include %/$(KIND)$(if $(filter $<,$(USE_JSON)),-json).h)

# V=1 shows whole commands.
QUIET := $(if $(V),,@)

# All cores, unless the command line says -j.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc) --no-print-directory
endif

# These share objects, which two makes must not write at the same time.
ifneq ($(word 2,$(filter test sanitize race barriers,$(MAKECMDGOALS))),)
.NOTPARALLEL:
endif

ROOMS := device kvstore attention model tokenizer cli
SOURCES := $(foreach room,$(ROOMS),$(sort $(wildcard $(room)/*.cpp)))
TESTS := $(sort $(wildcard tests/*.cpp))
FUZZERS := $(sort $(wildcard tests/fuzz/*.cpp))
FUZZED := $(filter device/% tokenizer/% $(addprefix model/,config% file_kind% gguf% safetensors% tensor%),$(SOURCES))
OBJECTS := $(SOURCES:%.cpp=$(BUILD)/%.o)
COMMANDS := $(filter $(BUILD)/cli/%,$(OBJECTS))
USE_JSON := $(shell grep -l '<nlohmann/json.hpp>' $(SOURCES) $(TESTS))
WITH_CUDA := $(filter-out $(BUILD)/model/no_cuda.o,$(OBJECTS))  # what CUDA sources are linked with
# Where the objects of tests are, which have no sanitizers: `make sanitize` takes those of `make test`.
TESTED := $(BUILD)
# And where the host's are that the emulator's tests need: a race of kernels is none of theirs.
HOST := $(BUILD)
TEST_OBJECTS := $(patsubst %.cpp,$(TESTED)/%.o,$(filter-out tests/main.cpp,$(TESTS)))
TEST_MAIN := $(BUILD)/tests/main.o  # tells tests whether the code has sanitizers
FUZZ_OBJECTS := $(FUZZED:%.cpp=$(BUILD)/%.o)

# What CPUs other than this one run: AVX2 where it has more, and no AVX at all.
X86 := $(filter x86_64,$(shell uname -m))
PORTABLE := $(if $(X86),x86-64-v2,$(ARCH))
WITH_AVX2 := $(if $(shell grep -sow -m 1 avx512f /proc/cpuinfo),x86-64-v3,$(ARCH))
ARITHMETIC := attention forward ghost ghost_rope kvstore ops tiered_attention

# CUDA sources: for the GPU by nvcc, and for the emulator (tests/simt/simt.h) by $(CXX).
CUDA_BUILD ?= $(BUILD)/cuda
NVCC ?= $(or $(wildcard $(CURDIR)/cuda-toolkit/bin/nvcc),$(shell command -v nvcc), \
  $(wildcard /usr/local/cuda/bin/nvcc))
CUDA_LIB = $(firstword $(wildcard $(patsubst %/bin/nvcc,%/lib64,$(NVCC))) /usr/lib)
CUDA_LIBS = -L$(CUDA_LIB) -Wl,-rpath,$(CUDA_LIB) -lcublasLt \
  $(if $(wildcard $(CUDA_LIB)/libcudart_static.a),-lcudart_static -ldl -lrt,-lcudart)
CUDA_SOURCES := $(foreach room,$(ROOMS),$(sort $(wildcard $(room)/*.cu)))
CUDA_OBJECTS := $(CUDA_SOURCES:%.cu=$(CUDA_BUILD)/%.o)
SIMT := $(sort $(wildcard tests/simt/*.cpp))
SIMT_TESTS := $(sort $(wildcard tests/simt/test_*.cu))
SIMT_OBJECTS := $(SIMT:%.cpp=$(BUILD)/simt/%.o)
# What the emulator's tests are linked with: the host code that they need, and the kernels.
SIMT_NEEDS := device/% kvstore/% attention/% model/%
SIMT_HOST := $(patsubst $(BUILD)/%,$(HOST)/%,$(filter $(SIMT_NEEDS:%=$(BUILD)/%.o),$(WITH_CUDA)))
EMULATED := $(CUDA_SOURCES:%.cu=$(BUILD)/simt/%.o)
# Tests with kernels of their own are compiled as kernels are, the others need no sanitizers, either.
SIMT_KERNEL_TESTS := $(shell grep -l __global__ $(SIMT_TESTS))
SIMT_PLAIN_TESTS := $(filter-out $(SIMT_KERNEL_TESTS),$(SIMT_TESTS))
SIMT_TEST_OBJECTS := $(SIMT_KERNEL_TESTS:%.cu=$(BUILD)/simt/%.o) $(SIMT_PLAIN_TESTS:%.cu=$(TESTED)/simt/%.o)
SIMT_LINKED := $(SIMT_HOST) $(TEST_MAIN) $(EMULATED) $(SIMT_TEST_OBJECTS)
# Those that are not of the emulator itself run on a device, too.
CUDA_TESTS := $(filter-out %/test_block.cu %/test_cublaslt.cu %/test_streams.cu,$(SIMT_TESTS)) \
  tests/simt/on_device.cu
CUDA_TEST_OBJECTS := $(CUDA_TESTS:%.cu=$(CUDA_BUILD)/%.o)
# What has no kernels is plain C++, which nvcc need not compile once more for every device.
CUDA_PLAIN := $(shell grep -L '__global__\|\.cuh"' $(CUDA_SOURCES) $(CUDA_TESTS))

# Real code for Ampere and Hopper, and PTX for what comes after.
NVCC_COMPILE = $(NVCC) -std=c++20 -O3 -I. $(CUDA_CODE) -Xcompiler -Wall,-Wextra -Werror all-warnings
CUDA_CODE = $(CUDA_DEVICES) -lineinfo -Xptxas -v
# Tests are compiled for one device only, whose code newer ones translate: that takes half the time.
CUDA_DEVICES = -gencode arch=compute_80,code=sm_80 \
  -gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90
SIMT_COMPILE = $(COMPILE) -Wno-unknown-pragmas -Itests/simt/include -x c++

MODEL := weights/SmolLM2-135M-Instruct.Q4_1.gguf
PROMPT := What is a glacier? Answer in three sentences.

## all         build/thaw, for this machine (the default; ARCH=x86-64-v3 for another)
all: $(BUILD)/thaw

## cuda        build/thaw-cuda, which also runs on NVIDIA GPUs; needs nvcc
cuda: $(BUILD)/thaw-cuda

## emulate     build/thaw-emulated: the GPU's code on the CPU, by the emulator of the tests; very slow
emulate: $(BUILD)/thaw-emulated

## demo        install what is missing, build, and stream an answer of a small model
demo:
	@tools/setup.sh build weights
	@$(MAKE) $(BUILD)/thaw
	$(BUILD)/thaw generate -m $(MODEL) --chat -p "$(PROMPT)" --temp 0.6 --repeat-penalty 1.1 \
	  --seed 1

## test        install what is missing, build, run every test
test:
	@tools/setup.sh build test weights
	@$(MAKE) $(BUILD)/thaw $(BUILD)/thaw-tests $(BUILD)/thaw-simt-tests $(BUILD)/thaw-emulated
	@tests/tally.sh --together \
	  "tests/cases.py $(BUILD)/thaw-tests" "tests/cases.py $(BUILD)/thaw-simt-tests" \
	  "tests/readme.sh $(BUILD)/thaw" "tests/emulated.sh $(BUILD)/thaw-emulated" \
	  "tools/gpu_check.sh --emulated"

## sanitize    the same tests under AddressSanitizer and UndefinedBehaviorSanitizer, with AVX2
sanitize: TESTED := $(if $(filter $(ARCH),$(WITH_AVX2)),$(BUILD),$(BUILD)/sanitize)
sanitize:
	@tools/setup.sh build test weights
	@$(if $(filter $(BUILD),$(TESTED)),$(MAKE) $(TEST_OBJECTS) $(SIMT_PLAIN_TESTS:%.cu=$(BUILD)/simt/%.o))
	@$(MAKE) BUILD=$(BUILD)/sanitize TESTED=$(TESTED) ARCH=$(WITH_AVX2) SAN=address,undefined OPT=-O1 \
	  WARN= sanitize-run

sanitize-run: $(BUILD)/thaw $(BUILD)/thaw-tests $(BUILD)/thaw-simt-tests
	@tests/tally.sh "tests/cases.py $(BUILD)/thaw-tests" "tests/cases.py $(BUILD)/thaw-simt-tests"

## portable    the tests of arithmetic, of code for CPUs without AVX2
portable:
	@tools/setup.sh build test
	@$(MAKE) BUILD=$(BUILD)/portable ARCH=$(PORTABLE) OPT=-O1 portable-run

portable-run: $(BUILD)/thaw-arithmetic-tests
	@tests/tally.sh "tests/cases.py $<"

## race        the kernels' tests on the emulator under ThreadSanitizer
race: race-plain
	@$(MAKE) BUILD=$(BUILD)/race TESTED=$(BUILD) HOST=$(BUILD) SAN=thread OPT=-O1 WARN= race-run

race-plain:
	@tools/setup.sh build test
	@$(MAKE) $(SIMT_HOST) $(SIMT_PLAIN_TESTS:%.cu=$(BUILD)/simt/%.o)

race-run: $(BUILD)/thaw-simt-tests
	@tests/tally.sh "tests/cases.py $<"

## barriers    take away one barrier, fence, atomic or wait at a time: a test must notice (three minutes)
# SHARE=8: every eighth, others after every commit.
SHARE ?= 1
barriers: race-plain
	@$(MAKE) BUILD=$(BUILD)/race TESTED=$(BUILD) HOST=$(BUILD) SAN=thread OPT=-O1 WARN= barriers-run

barriers-run: $(BUILD)/thaw-simt-tests
	@tests/tally.sh "tests/barriers.py $< $(SHARE)"

## cuda-tests  build/thaw-cuda-tests: the kernels' tests for a GPU; needs nvcc, and to run, a GPU
cuda-tests: $(BUILD)/thaw-cuda-tests

## cuda-objects  compile every kernel for the GPU; needs nvcc, and no GPU
cuda-objects: $(CUDA_OBJECTS)

## kernels     registers, shared memory and spills of every kernel, from ptxas; a spill is an error
kernels: $(CUDA_OBJECTS)
	@tools/kernels.sh $(^:.o=.ptxas)

## profile     what Nsight Compute says of one op's kernels when decoding: make profile K=attend
K ?= attend
PROFILED ?= --random 1b --weights q4_0 -d 4096
profile: $(BUILD)/thaw-cuda
	@command -v ncu >/dev/null || { echo "profile: expected ncu (Nsight Compute) in PATH"; exit 1; }
	ncu --set full --nvtx --nvtx-include "timed/" --launch-skip 16 --launch-count 4 \
	  $(BUILD)/thaw-cuda bench --backend cuda $(PROFILED) --op $(K) -n 2

## trace       a timeline of a prompt and a decode, by Nsight Systems: build/trace.nsys-rep
trace: $(BUILD)/thaw-cuda
	@command -v nsys >/dev/null || { echo "trace: expected nsys (Nsight Systems) in PATH"; exit 1; }
	nsys profile --trace cuda,nvtx --cuda-graph-trace node --force-overwrite true \
	  -o $(BUILD)/trace $(BUILD)/thaw-cuda bench --backend cuda $(PROFILED) -p 512 -n 32 -r 1

## fuzz        each fuzzer in tests/fuzz/ for FUZZ_SECONDS (20) seconds; needs clang
fuzz:
	@tools/setup.sh build fuzz
	@$(MAKE) BUILD=$(BUILD)/fuzz CXX=clang++ SAN=fuzzer-no-link,address,undefined OPT=-O1 \
	  WARN= fuzz-run

# What a run finds is added to build/fuzz/NAME.corpus; tests/fuzz/corpus/NAME holds the seeds.
fuzz-run: $(FUZZERS:tests/fuzz/%.cpp=$(BUILD)/%)
	@mkdir -p $(^:%=%.corpus)
	@tests/tally.sh --together $(foreach f,$^,"$(f) $(FUZZ_FLAGS) $(f).corpus $(wildcard tests/fuzz/corpus/$(notdir $(f)))")

## mutants     plant bugs in the KV store one at a time: its tests must find each (ten minutes)
mutants:
	@ARCH=$(WITH_AVX2) tests/mutants.sh

## install     thaw into PREFIX/bin (PREFIX=/usr/local; DESTDIR is honoured)
install: $(BUILD)/thaw
	install -D -m 755 $(BUILD)/thaw $(DESTDIR)$(PREFIX)/bin/thaw
	install -D -m 644 LICENSE $(DESTDIR)$(PREFIX)/share/doc/thaw/LICENSE

## setup       only install what building and testing need (asks for root only if something is missing)
setup:
	tools/setup.sh build test weights

## weights     only download the small model and the tokenizer that demo and tests use (100 MB)
weights:
	tools/setup.sh weights

## cuda-toolkit  nvcc and its libraries into cuda-toolkit/, without root (525 MB from PyPI)
cuda-toolkit:
	@tools/setup.sh cuda

## clean       remove everything that was built; weights and cuda-toolkit/ stay
clean:
	rm -rf $(BUILD)

## help        this list
help:
	@sed -n 's/^## /  make /p' Makefile

$(BUILD)/thaw: $(BUILD)/main.o $(OBJECTS)
	@echo "link $@"
	$(QUIET)$(LINK) -o $@ $^ $(LIBS)
	@echo "thaw: CUDA is left out:" \
	  "$(if $(NVCC),make cuda builds build/thaw-cuda with it,no nvcc (make cuda-toolkit brings it))"

$(BUILD)/thaw-cuda: $(BUILD)/main.o $(WITH_CUDA) $(CUDA_OBJECTS)
	@echo "link $@"
	$(QUIET)$(LINK) -o $@ $^ $(LIBS) $(CUDA_LIBS)

$(BUILD)/thaw-cuda-tests: $(SIMT_HOST) $(CUDA_OBJECTS) $(CUDA_TEST_OBJECTS)
	@echo "link $@"
	$(QUIET)$(LINK) -o $@ $^ $(LIBS) $(CUDA_LIBS)

$(BUILD)/thaw-emulated: $(BUILD)/main.o $(WITH_CUDA) $(EMULATED) $(SIMT_OBJECTS)
	@echo "link $@"
	$(QUIET)$(LINK) -o $@ $^ $(LIBS)

$(BUILD)/thaw-tests: $(OBJECTS) $(TEST_MAIN) $(TEST_OBJECTS)  # in this order: of functions in both, the former's
	@echo "link $@"
	$(QUIET)$(LINK) -o $@ $^ $(LIBS)

$(BUILD)/thaw-arithmetic-tests: $(ARITHMETIC:%=$(BUILD)/tests/test_%.o) $(TEST_MAIN) \
  $(filter-out $(BUILD)/cli/% $(BUILD)/tokenizer/%,$(OBJECTS))
	@echo "link $@"
	$(QUIET)$(LINK) -o $@ $^ $(LIBS)

$(BUILD)/thaw-simt-tests: $(SIMT_LINKED) $(SIMT_OBJECTS)
	@echo "link $@"
	$(QUIET)$(LINK) -o $@ $^ $(LIBS)

$(FUZZERS:tests/fuzz/%.cpp=$(BUILD)/%): $(BUILD)/%: $(BUILD)/tests/fuzz/%.o $(FUZZ_OBJECTS)
	@echo "link $@"
	$(QUIET)$(LINK) -fsanitize=fuzzer -o $@ $^ $(LIBS)

$(BUILD)/main.o: main.cu $(BUILD)/flags
	@mkdir -p $(@D)
	@echo "compile $<"
	$(QUIET)$(COMPILE) -MMD -MP -c -x c++ -o $@ $<

$(filter-out $(COMMANDS),$(OBJECTS)): $(PARSED:%=%/rooms.h.gch) $(PARSED:%=%/rooms-json.h.gch)
ifeq ($(OPT),-O3)
$(COMMANDS) $(EMULATED): KIND := commands
$(COMMANDS): $(PARSED:%=%/commands.h.gch) $(PARSED:%=%/commands-json.h.gch)
$(EMULATED): $(PARSED:%=%/commands.h.gch)
else
$(COMMANDS): $(PARSED:%=%/rooms.h.gch) $(PARSED:%=%/rooms-json.h.gch)
$(EMULATED): $(PARSED:%=%/rooms.h.gch)
endif
PLAIN_TESTS := $(filter $(BUILD)/%,$(TEST_OBJECTS) $(SIMT_PLAIN_TESTS:%.cu=$(TESTED)/simt/%.o))
$(PLAIN_TESTS): KIND := tests
$(PLAIN_TESTS): $(PARSED:%=%/tests.h.gch) $(PARSED:%=%/tests-json.h.gch)
# Of the sanitizers main.cpp needs to know, no more; it asks doctest.h for what others do not have.
$(TEST_MAIN): private SAN_FLAGS := -DSANITIZERS='"$(SAN)"'
$(TEST_MAIN): private OPT := -Og
$(TEST_MAIN) $(SIMT_KERNEL_TESTS:%.cu=$(BUILD)/simt/%.o) $(SIMT_OBJECTS): WITH =
# These checks are a fifth of compiling them; AddressSanitizer sees what comes of a null pointer.
$(COMMANDS): private SAN_FLAGS += $(SAN:%=-fno-sanitize=null,alignment)
# Commands spend their time in the other rooms: -O1 saves a quarter of compiling them.
$(COMMANDS) $(BUILD)/parsed/commands%gch: private OPT := $(OPT:-O3=-O1)
# What tests test is not in them. -Og and doctest's quick asserts save a third of the time that -O1
# takes, and sanitizers would double it.
$(PLAIN_TESTS) $(BUILD)/parsed/tests%gch: private OPT := $(OPT:-O3=-Og)
$(PLAIN_TESTS) $(BUILD)/parsed/tests%gch: private SAN_FLAGS :=
$(BUILD)/%.o: %.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	@echo "compile $<"
	$(QUIET)$(COMPILE) $(WITH) -MMD -MP -c -o $@ $<

$(BUILD)/parsed/%.h.gch: $(BUILD)/flags
	@mkdir -p $(@D)
	@echo "parse library headers for $*"
	$(QUIET)printf '#include <%s>\n' $(if $(filter tests%,$*),$(PARSED_TESTS),$(PARSED_ROOMS)) \
	  $(if $(filter %-json,$*),nlohmann/json.hpp) >$(@:.gch=)
	$(QUIET)$(COMPILE) -x c++-header -o $@ $(@:.gch=)

# Their time goes into taking turns, so kernels on the emulator need no more either.
$(EMULATED): private OPT := $(OPT:-O3=-O1)
$(SIMT_KERNEL_TESTS:%.cu=$(BUILD)/simt/%.o): private OPT := $(OPT:-O3=-Og)
$(BUILD)/simt/%.o: %.cu $(BUILD)/flags
	@mkdir -p $(@D)
	@echo "emulate $<"
	$(QUIET)$(SIMT_COMPILE) $(WITH) -MMD -MP -c -o $@ $<

# ThreadSanitizer must not see the emulator's own work, only what it is told of CUDA's order.
$(SIMT_OBJECTS): SAN_FLAGS := $(if $(filter thread,$(SAN)),-DSIMT_RACE,$(SAN_FLAGS))
$(BUILD)/simt/%.o: %.cpp $(BUILD)/flags
	@mkdir -p $(@D)
	@echo "compile $<"
	$(QUIET)$(COMPILE) -Itests/simt/include -MMD -MP -c -o $@ $<

$(CUDA_PLAIN:%.cu=$(CUDA_BUILD)/%.o): CUDA_CODE := -x c++
$(CUDA_TEST_OBJECTS): CUDA_DEVICES := -gencode arch=compute_80,code=compute_80
$(CUDA_BUILD)/%.o: %.cu Makefile
	@mkdir -p $(@D)
	@test -n "$(NVCC)" || { echo "nvcc is missing: make cuda-toolkit brings it"; exit 1; }
	@echo "nvcc $<"
	$(QUIET)$(NVCC_COMPILE) -MMD -MP -MF $(@:.o=.d) -c -o $@ $< >$(@:.o=.ptxas) 2>&1 || \
	  { cat $(@:.o=.ptxas); rm -f $@; exit 1; }

# Pages that the binary carries, as C++ string literals.
$(BUILD)/%.inc: %
	@mkdir -p $(@D)
	$(QUIET){ printf 'R"page('; cat $<; printf ')page"'; } >$@

$(BUILD)/cli/freeze_map_page.o: $(patsubst %,$(BUILD)/%.inc,$(wildcard cli/freeze_map/*))

# Changes only when the compiler or its flags do, and then everything is compiled again.
$(BUILD)/flags: force
	@mkdir -p $(@D)
	@echo '$(COMPILE)' | cmp -s - $@ || echo '$(COMPILE)' >$@

-include $(OBJECTS:.o=.d) $(TEST_MAIN:.o=.d) $(TEST_OBJECTS:.o=.d) $(FUZZERS:%.cpp=$(BUILD)/%.d) $(BUILD)/main.d \
  $(SIMT_LINKED:.o=.d) $(SIMT_OBJECTS:.o=.d) $(CUDA_OBJECTS:.o=.d) $(CUDA_TEST_OBJECTS:.o=.d)

.PHONY: all cuda cuda-toolkit cuda-tests emulate demo test sanitize sanitize-run portable \
  portable-run fuzz fuzz-run race race-plain race-run barriers barriers-run cuda-objects kernels profile trace \
  mutants install setup weights clean help force

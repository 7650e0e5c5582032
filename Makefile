# thaw: build, test, demo. `make help` lists the targets.
CXX ?= g++
BUILD ?= build
ARCH ?= native
OPT ?= -O3
SAN ?=
WARN := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Werror
CXXFLAGS += -std=c++20 $(OPT) -march=$(ARCH) -fopenmp -g1 -I. $(WARN) $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all)
LDFLAGS += -fopenmp $(if $(SAN),-fsanitize=$(SAN))
LDLIBS += -lpcre2-8

ROOMS := device kvstore attention model tokenizer cli
SOURCES := $(foreach room,$(ROOMS),$(sort $(wildcard $(room)/*.cpp)))
TESTS := $(sort $(wildcard tests/*.cpp))
OBJECTS := $(SOURCES:%.cpp=$(BUILD)/%.o)
TEST_OBJECTS := $(TESTS:%.cpp=$(BUILD)/%.o)

all: $(BUILD)/thaw

$(BUILD)/thaw: $(BUILD)/main.o $(OBJECTS)
	$(CXX) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/thaw-tests: $(TEST_OBJECTS) $(OBJECTS)
	$(CXX) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(BUILD)/main.o: main.cu
	@mkdir -p $(@D)
	$(CXX) $(CPPFLAGS) $(CXXFLAGS) -MMD -MP -c -x c++ -o $@ $<

$(BUILD)/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CPPFLAGS) $(CXXFLAGS) -MMD -MP -c -o $@ $<

-include $(OBJECTS:.o=.d) $(TEST_OBJECTS:.o=.d) $(BUILD)/main.d

.PHONY: all

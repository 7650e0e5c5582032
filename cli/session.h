// A conversation in a file: one line of JSON, which says what was said, and then the exact keys and
// values of its tokens (kvstore/saved_rows.h), so that going on reads nothing again.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "cli/conversation.h"
#include "device/mapped_file.h"
#include "kvstore/saved_rows.h"
#include "model/model.h"

namespace thaw {

struct Session {
  std::string model;       // its name,
  std::uint64_t identity;  // and model/identity.h of it
  Said said;               // bytes of messages that were not UTF-8 are U+FFFD; tokens are exact
  MappedFile file;
  SavedRows rows;  // of the first tokens; a view into the file
};

// Throws Error when the file is not there, or names the first field that is not as it must be.
Session read_session(const std::filesystem::path& path);

// Whether there is a file to read: one that is empty does not count.
bool has_session(const std::filesystem::path& path);

// Throws Error when no session can be written there, or something else stands there.
void require_writable_session(const std::filesystem::path& path);

// Returns the bytes written. Only the user can read the file, which appears when it is complete.
// Throws Error as above, or when it cannot be completed.
std::int64_t write_session(const std::filesystem::path& path, const Model& model,
                           const Conversation& conversation);

// What a conversation has to be, to go on with that of a file. `rows`: whether the file's keys and
// values are of the weights of `model`; otherwise the text is encoded anew, and read with the next
// message. Throws Error when it does not fit the model or the context.
struct Resumed {
  Said said;
  bool rows;
};
Resumed resumed(const Session& session, const Model& model, const Conversation& conversation);

}  // namespace thaw

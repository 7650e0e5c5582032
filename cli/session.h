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
  std::string system;
  std::vector<Conversation::Turn> turns;
  std::vector<TokenId> tokens;
  MappedFile file;
  SavedRows rows;  // of the first tokens; a view into the file
};

// Throws Error when the file is not there, or names the first field that is not as it must be.
Session read_session(const std::filesystem::path& path);

// Returns the bytes written. The file appears when it is complete. Throws Error when it cannot be
// written, or stands there already and is no session.
std::int64_t write_session(const std::filesystem::path& path, const Model& model,
                           const Conversation& conversation);

// Goes on with it: `conversation` then is that of the file. Where it was written with the weights
// of `model`, its keys and values are taken as they are, but for the last tokens; otherwise its
// text is encoded anew, and read with the next message. Returns whether they were taken. Throws
// Error, with nothing changed, when it does not fit the context.
bool resume(const Session& session, const Model& model, Conversation& conversation);

}  // namespace thaw

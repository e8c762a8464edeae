// Which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastclip::cpu {

// Names of the instruction sets that this build has and this machine can run, narrowest first.
std::vector<std::string> supported_instruction_sets();

// The kernels in use: the widest supported set, or the one that `select` chose.
const Kernels& kernels();

// False if the name is unknown or the machine cannot run it.
bool select_instruction_set(const std::string& name);

}  // namespace fastclip::cpu

// A hybrid model in C++: full attention in group 0, a sliding window in group 1. One process saves
// blocks of both groups and loads them back.
//
//   c++ -std=c++17 hybrid.cpp -o hybrid $(pkg-config --cflags --libs pegaflow)
#include <pegaflow.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::uint64_t kBlockBytes = 8192;
constexpr std::uint32_t kBlocks = 32;
constexpr std::uint64_t kPatienceMs = 10000;

int check(int result, const char *what) {
    if (result < 0) {
        throw std::runtime_error(std::string(what) + ": " + pega_last_error());
    }
    return result;
}

struct Disconnect {
    void operator()(pega_client *client) const { pega_disconnect(client); }
};
using Client = std::unique_ptr<pega_client, Disconnect>;

Client connect() {
    pega_client *client = nullptr;
    check(pega_connect(nullptr, &client), "pega_connect");
    return Client(client);
}

// A sized struct of the C interface, all zeros but its size.
template <typename T> T sized() {
    T value{};
    value.size = sizeof value;
    return value;
}

pega_completion finish(pega_client *client, std::uint64_t request) {
    auto done = sized<pega_completion>();
    check(pega_wait(client, request, kPatienceMs, &done), "pega_wait");
    if (done.status != PEGA_OK) {
        throw std::runtime_error(pega_status_text(static_cast<int>(done.status)));
    }
    return done;
}

// One group's memory: kBlocks blocks, one after the other.
class GroupMemory {
public:
    explicit GroupMemory(pega_client *client) {
        void *memory = nullptr;
        check(pega_alloc_host(client, kBlockBytes * kBlocks, &memory), "pega_alloc_host");
        bytes_ = static_cast<unsigned char *>(memory);
    }
    unsigned char *block(std::uint32_t id) const { return bytes_ + id * kBlockBytes; }
    void fill(std::uint32_t id, int value) const { std::memset(block(id), value, kBlockBytes); }
    bool holds(std::uint32_t id, int value) const {
        const std::vector<unsigned char> expected(kBlockBytes, static_cast<unsigned char>(value));
        return std::memcmp(block(id), expected.data(), kBlockBytes) == 0;
    }

private:
    unsigned char *bytes_ = nullptr;
};

std::uint32_t register_groups(pega_client *client, const std::vector<GroupMemory> &memory) {
    std::vector<pega_segment> segments;
    for (const auto &piece : memory) {
        auto segment = sized<pega_segment>();
        segment.address = piece.block(0);
        segment.block_stride = kBlockBytes;
        segment.bytes = kBlockBytes;
        segments.push_back(segment);
    }
    std::vector<pega_group> groups;
    for (std::size_t number = 0; number < segments.size(); number++) {
        auto group = sized<pega_group>();
        group.group = static_cast<std::uint32_t>(number);
        group.num_blocks = kBlocks;
        group.num_segments = 1;
        group.segments = &segments[number];
        groups.push_back(group);
    }
    auto ns = sized<pega_namespace>();
    ns.block_tokens = 16;
    ns.model = "example/hybrid";
    ns.dtype = "bfloat16";
    ns.hash_algorithm = "example-v1";
    auto spec = sized<pega_registration>();
    spec.world_size = 1;
    spec.instance = "example-hybrid";
    spec.ns = &ns;
    spec.groups = groups.data();
    spec.num_groups = static_cast<std::uint32_t>(groups.size());
    std::uint32_t registration = 0;
    check(pega_register(client, &spec, &registration), "pega_register");
    check(pega_wait_ready(client, registration, kPatienceMs), "pega_wait_ready");
    return registration;
}

pega_hash name_of(std::uint32_t number) {
    pega_hash hash{};
    std::memcpy(hash.bytes, "hybrid", 6);
    std::memcpy(hash.bytes + 8, &number, sizeof number);
    return hash;
}

void run() {
    const Client client = connect();
    std::vector<GroupMemory> memory;
    memory.emplace_back(client.get());
    memory.emplace_back(client.get());
    const std::uint32_t id = register_groups(client.get(), memory);

    // Eight blocks are computed; of the window, only the last two are kept.
    std::vector<pega_hash> names;
    std::vector<std::uint32_t> blocks;
    for (std::uint32_t number = 0; number < 8; number++) {
        names.push_back(name_of(number));
        blocks.push_back(number);
        memory[0].fill(number, static_cast<int>(100 + number));
        memory[1].fill(number, static_cast<int>(200 + number));
    }
    std::uint64_t request = 0;
    check(pega_save(client.get(), id, 0, names.data(), blocks.data(), 8, &request), "pega_save");
    finish(client.get(), request);
    check(pega_save(client.get(), id, 1, &names[6], &blocks[6], 2, &request), "pega_save");
    finish(client.get(), request);

    // Group 0 answers with the longest prefix, the other group with a bit for each position.
    std::uint64_t bitmap = 0;
    check(pega_query(client.get(), id, 1, 1, names.data(), 8, 0, &bitmap, 1, &request),
          "pega_query");
    const pega_completion window = finish(client.get(), request);
    std::printf("window: %u of 8 positions, bitmap %#llx\n", window.count,
                static_cast<unsigned long long>(bitmap));
    if (window.count != 2 || bitmap != 0xC0) {
        throw std::runtime_error("the window should hold positions 6 and 7");
    }
    const std::uint32_t free_blocks[] = {20, 21};
    check(pega_load(client.get(), id, 1, window.lease, 0, free_blocks, 2, &request), "pega_load");
    finish(client.get(), request);
    if (!memory[1].holds(20, 206) || !memory[1].holds(21, 207)) {
        throw std::runtime_error("the window's bytes differ");
    }
    std::printf("loaded: every byte right\n");
}

} // namespace

int main() {
    try {
        run();
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}

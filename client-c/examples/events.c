/*
 * The client in an event loop: requests are submitted, and the loop sleeps on one descriptor.
 *
 *   cc events.c -o events $(pkg-config --cflags --libs pegaflow)
 */
#include <poll.h>

#include "common.h"

#define REQUESTS 100u

int main(void)
{
    pega_client *client = NULL;
    check(pega_connect(NULL, &client), "pega_connect");
    int fd = pega_completion_fd(client);
    check(fd, "pega_completion_fd");

    unsigned submitted = 0, finished = 0;
    while (finished < REQUESTS) {
        /* As many as there is room for. */
        while (submitted < REQUESTS) {
            uint64_t request = 0;
            int result = pega_nop(client, &request);
            if (result == -PEGA_AGAIN) {
                break;
            }
            check(result, "pega_nop");
            submitted++;
        }
        /* Until nothing is left: only then does the descriptor tell of what comes next. */
        for (;;) {
            pega_completion done[16];
            int count = pega_poll(client, done, 16);
            check(count, "pega_poll");
            if (count == 0) {
                break;
            }
            for (int at = 0; at < count; at++) {
                if (done[at].status != PEGA_OK) {
                    fprintf(stderr, "nop: %s\n", pega_status_text((int)done[at].status));
                    return 1;
                }
            }
            finished += (unsigned)count;
        }
        if (finished < REQUESTS) {
            struct pollfd wait = {.fd = fd, .events = POLLIN, .revents = 0};
            if (poll(&wait, 1, 10000) == 0) {
                fprintf(stderr, "no completion within 10 s\n");
                return 1;
            }
        }
    }
    printf("%u requests finished\n", finished);
    check(pega_disconnect(client), "pega_disconnect");
    return 0;
}

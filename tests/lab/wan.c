/* A router between network namespaces, whose links have delay, rate, queue, loss and jitter.
 *
 *     wan DEVICE GSO SEED  NAMESPACE,DELAY_NS,JITTER_NS,BYTES_PER_S,QUEUE_NS,LOSS  ...
 *
 * Kernels without netem can emulate a wide-area network with this. Each namespace gets a TUN device; a packet
 * for the address that ends in .N (or ::N) goes to the N-th of them:
 *
 *     sender's uplink (rate, queue) -> delay of both ends, jitter -> receiver's downlink (rate, queue)
 *
 * With GSO, one read moves up to 64 KB, as between real hosts and their network cards; on the wire each segment
 * counts with its own headers. Addresses are given to the devices by whoever started us, after we print "up".
 * A line on stdin is answered by the counters, its end is ours.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MAX_ENDS = 16, BUFFER = 70 * 1024, BATCH = 64, REALTIME = 20 };
static const int64_t FOREVER = INT64_MAX;

struct packet {
  struct packet *next;
  int64_t due;
  int64_t sending; /* how long it took on the uplink */
  uint32_t wire;   /* bytes on the wire */
  uint32_t size;
  uint8_t data[];
};

struct queue {
  struct packet *head, *tail;
};

struct end {
  int fd;
  int64_t delay, jitter, room;
  double ns_per_byte, loss;
  int64_t up_free, down_free;
  struct queue down;
  uint64_t sent, lost, full_up, full_down, delivered, bytes;
};

static struct end ends[MAX_ENDS];
static struct queue paths[MAX_ENDS][MAX_ENDS];
static int64_t latest[MAX_ENDS][MAX_ENDS];
static int count;
static size_t header; /* of the virtio_net kind, in front of each packet with GSO */

static void die(const char *what) {
  perror(what);
  exit(1);
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int64_t later(int64_t a, int64_t b) { return a > b ? a : b; }

static void push(struct queue *q, struct packet *p) {
  p->next = NULL;
  if (q->head)
    q->tail->next = p;
  else
    q->head = p;
  q->tail = p;
}

static struct packet *pop(struct queue *q) {
  struct packet *p = q->head;
  q->head = p->next;
  return p;
}

static int tun(const char *space, const char *device) {
  char path[256];
  snprintf(path, sizeof path, "/run/netns/%s", space);
  int there = open(path, O_RDONLY | O_CLOEXEC);
  if (there < 0 || setns(there, CLONE_NEWNET)) die(path);
  close(there);
  int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) die("/dev/net/tun");
  struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI | (header ? IFF_VNET_HDR : 0)};
  strncpy(request.ifr_name, device, IFNAMSIZ - 1);
  if (ioctl(fd, TUNSETIFF, &request)) die("TUNSETIFF");
  if (header && ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)) die("TUNSETOFFLOAD");
  return fd;
}

/* Which end a packet is for, or -1. */
static int target(const uint8_t *ip, size_t size) {
  int last = -1;
  if (size >= 20 && ip[0] >> 4 == 4 && ip[16] < 224) last = ip[19];
  if (size >= 40 && ip[0] >> 4 == 6 && ip[24] != 0xff) last = ip[39];
  return last >= 1 && last <= count ? last - 1 : -1;
}

/* Bytes on the wire: a packet that will be cut into segments has its headers once for each. */
static uint32_t on_wire(const uint8_t *data, uint32_t size) {
  if (!header) return size;
  const struct virtio_net_hdr *h = (const void *)data;
  uint32_t bytes = size - header;
  if (h->gso_type == VIRTIO_NET_HDR_GSO_NONE || !h->gso_size || h->hdr_len >= bytes) return bytes;
  uint32_t segments = (bytes - h->hdr_len + h->gso_size - 1) / h->gso_size;
  return bytes + (segments - 1) * h->hdr_len;
}

/* A packet leaves the namespace of `from`. */
static void depart(int from, const uint8_t *data, uint32_t size) {
  if (size <= header) return;
  int to = target(data + header, size - header);
  if (to < 0 || to == from) return;
  struct end *e = &ends[from];
  e->sent++;
  if (e->loss > 0 && drand48() < e->loss) {
    e->lost++;
    return;
  }
  int64_t t = now(), start = later(t, e->up_free);
  if (start - t > e->room) {
    e->full_up++;
    return;
  }
  struct packet *p = malloc(sizeof *p + size);
  if (!p) die("malloc");
  memcpy(p->data, data, size);
  p->size = size;
  p->wire = on_wire(data, size);
  p->sending = p->wire * e->ns_per_byte;
  e->up_free = start + p->sending;
  int64_t jitter = e->jitter ? drand48() * e->jitter : 0;
  p->due = later(e->up_free + e->delay + ends[to].delay + jitter, latest[from][to]);
  latest[from][to] = p->due;
  push(&paths[from][to], p);
}

static void deliver(struct end *e, struct packet *p) {
  if (write(e->fd, p->data, p->size) > 0) { /* fails while the device is down */
    e->delivered++;
    e->bytes += p->wire;
  }
  free(p);
}

/* A packet reaches the downlink of its receiver, its first bit `sending` before its last. */
static void arrive(struct end *e, struct packet *p) {
  int64_t start = later(e->down_free, p->due - p->sending);
  if (start - p->due > e->room) {
    e->full_down++;
    free(p);
    return;
  }
  e->down_free = start + (int64_t)(p->wire * e->ns_per_byte);
  p->due = later(e->down_free, p->due);
  push(&e->down, p);
}

/* Move what is due, return when the next packet is. */
static int64_t advance(void) {
  int64_t t = now(), next = FOREVER;
  for (int to = 0; to < count; to++) {
    struct end *e = &ends[to];
    for (int from = 0; from < count; from++) {
      struct queue *q = &paths[from][to];
      while (q->head && q->head->due <= t) arrive(e, pop(q));
      if (q->head && q->head->due < next) next = q->head->due;
    }
    while (e->down.head && e->down.head->due <= t) deliver(e, pop(&e->down));
    if (e->down.head && e->down.head->due < next) next = e->down.head->due;
  }
  return next;
}

static void report(void) {
  printf("[");
  for (int i = 0; i < count; i++) {
    struct end *e = &ends[i];
    printf("%s{\"sent\":%lu,\"lost\":%lu,\"full_up\":%lu,\"full_down\":%lu,\"delivered\":%lu,\"bytes\":%lu}",
           i ? "," : "", e->sent, e->lost, e->full_up, e->full_down, e->delivered, e->bytes);
  }
  printf("]\n");
  fflush(stdout);
}

static void setup(int argc, char **argv) {
  if (argc < 6 || argc - 4 > MAX_ENDS) {
    fprintf(stderr, "usage: see the head of the source\n");
    exit(2);
  }
  header = atoi(argv[2]) ? sizeof(struct virtio_net_hdr) : 0;
  srand48(atol(argv[3]));
  for (int i = 4; i < argc; i++) {
    struct end *e = &ends[count++];
    char space[128];
    double delay, jitter, rate, room;
    if (sscanf(argv[i], "%127[^,],%lf,%lf,%lf,%lf,%lf", space, &delay, &jitter, &rate, &room, &e->loss) != 6) {
      fprintf(stderr, "not an end: %s\n", argv[i]);
      exit(2);
    }
    e->delay = delay;
    e->jitter = jitter;
    e->room = room;
    e->ns_per_byte = rate > 0 ? 1e9 / rate : 0;
    e->fd = tun(space, argv[1]);
  }
  prctl(PR_SET_TIMERSLACK, 1000);
  sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = REALTIME}); /* or as well as it goes */
  printf("up\n");
  fflush(stdout);
}

int main(int argc, char **argv) {
  static uint8_t buffer[BUFFER];
  setup(argc, argv);
  for (;;) {
    int64_t next = advance();
    struct pollfd polled[MAX_ENDS + 1] = {{.fd = 0, .events = POLLIN}};
    for (int i = 0; i < count; i++) polled[i + 1] = (struct pollfd){.fd = ends[i].fd, .events = POLLIN};
    int64_t wait = next == FOREVER ? 0 : later(next - now(), 0);
    struct timespec until = {wait / 1000000000, wait % 1000000000};
    if (ppoll(polled, count + 1, next == FOREVER ? NULL : &until, NULL) < 0 && errno != EINTR) die("ppoll");
    for (int i = 0; i < count; i++) {
      if (!(polled[i + 1].revents & POLLIN)) continue;
      for (int n = 0; n < BATCH; n++) {
        ssize_t size = read(ends[i].fd, buffer, sizeof buffer);
        if (size <= 0) break;
        depart(i, buffer, size);
      }
    }
    if (polled[0].revents) {
      if (read(0, buffer, sizeof buffer) <= 0) return 0;
      report();
    }
  }
}

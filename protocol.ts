/**
 * The wire between a reprise client and a reprise server: its specification, and the code that encodes and decodes it.
 *
 * One TCP connection carries frames both ways. The client opens with HELLO and may send requests in the same packet;
 * the server answers HELLO, then each request in the order of arrival. Nothing here does I/O, reads a clock or logs.
 *
 * ```text
 * [frame]      Every number is big-endian and unsigned unless marked i; numbers over 2^53-1 are refused.
 *
 *               0        4      5       9
 *              +--------+------+-------+---------------- - - -+     length = bytes of the payload alone
 *              | length | type | crc32 | payload              |     crc32  = of length, type and payload, so that
 *              |   u32  |  u8  |  u32  | `length` bytes       |              no damage on the way goes unseen
 *              +--------+------+-------+---------------- - - -+
 *
 *              str = u16 byte count, then that many bytes of UTF-8. A receiver refuses a frame that is longer than
 *              [limits] allow, does not have its crc32 or has an unknown type, ends early or has bytes left over.
 *
 * [types]      0x01-0x0f handshake, 0x10-0x2f requests, 0x30-0x3f between servers, 0x80-0xbf answers and content.
 *
 *              type  name      direction  payload
 *              0x01  HELLO     to server  magic u32 "RPRS", version u16, flags u32 (1: takes FILE; 2: direct; unknown
 *                                         bits are ignored), token str (empty: none)
 *              0x10  GET       to server  offset u64, length u64 (2^53-1: to the end), etag str, path str
 *              0x11  LIST      to server  flags u8 (1: the folders below as well), path str
 *              0x12  STAT      to server  path str
 *              0x13  STATUS    to server  empty
 *              0x1f  QUIT      to server  empty
 *              0x20  PUT       to server  offset u64, size u64 (2^53-1: not known), mtime i64, flags u8 (1: only if
 *                                         nothing has the name; 2: with content; 4: with the folders above it), id str,
 *                                         etag str, path str, content
 *              0x21  REMOVE    to server  flags u8 (1: a folder with all that is in it), path str
 *              0x22  MOVE      to server  flags u8 (1: in place of what has the name), path str, new path str
 *              0x23  MKDIR     to server  flags u8 (1: with the folders above it, also if it is there), path str
 *              0x24  SUMS      to server  id str (of an upload; "" for a file), path str
 *              0x30  LINK      both ways  a JSON object in UTF-8
 *              0x80  WELCOME   to client  version u16, software str
 *              0x81  REDIRECT  to client  port u16, flags u8 (1: which is to answer itself), host str
 *              0x82  ERROR     to client  code u16, text str
 *              0x83  META      to client  kind u8, size u64, mtime i64 (microseconds since 1970), offset u64, etag str
 *              0x84  DATA      both ways  content (1 to 524,288 bytes)
 *              0x85  END       both ways  count u64: of the bytes of content, or of the entries, before it
 *              0x86  ENTRIES   to client  one or more of: kind u8, size u64, mtime i64, path str
 *              0x87  INFO      to client  a JSON object in UTF-8
 *              0x88  SUM       to client  length u64, crc32 u32: of the next bytes
 *              0x89  WAIT      to client  empty
 *              0x8a  FILE      to client  kind u8, size u64, mtime i64, etag str, content (`size` bytes)
 *
 * [handshake]  HELLO -> WELCOME, or REDIRECT (connect there instead), or ERROR and the end of the connection. A server
 *              that does not speak the version answers ERROR `version`, whose text names the versions it speaks.
 *
 * [redirect]   A server that others have joined answers HELLO with a REDIRECT to each of them in turn; a client that is
 *              sent on says HELLO there in the same way, at most five times and never in a circle. With the flag `direct`
 *              the server answers itself; where members are all equal, REDIRECT says that this is to be asked for. REDIRECT may also come in place of the META of a GET or a STAT: the version that
 *              counts is not here yet, but there, where it is to be asked for directly. The connection goes on.
 *
 * [access]     A token is 1 to 255 bytes that the server has given out. ERROR `denied` answers one that is not known, has
 *              expired or leads nowhere, HELLO without one where one is needed, and a request that it does not allow: the
 *              same text after the same time, which grows with each failure of an address.
 *
 * [tls]        Where the server has a certificate, all of this travels in TLS (1.2 or 1.3), from the first byte on.
 *
 * [get]        GET -> META DATA* END, or ERROR in place of any of these frames. Content starts at `offset`, the bytes
 *              that the client already holds. A client that holds a part names its version with `etag`; if the file
 *              is another by now, the answer is ERROR `changed` and no content. So is the frame in place of the next
 *              DATA when the file changes while it is sent. Only END means that the content is complete. A small file
 *              that is asked for from its start comes as FILE, which is META, DATA and END in one, to a client whose HELLO
 *              says that it takes that.
 *
 * [put]        PUT DATA* END -> META of the new version, or ERROR. Acknowledged means on disk, under its name. Content
 *              starts at `offset`: what the server holds of the upload `id` before it is kept, what it holds beyond is
 *              dropped. With `etag`, the file must still be that version. An ERROR may come before END is sent; the
 *              client then sends END at once, whose count is not looked at, and the server passes over all before it.
 *              A PUT with content has all of it, and no DATA and END behind it. An id is 32 hexadecimal digits made up
 *              by the client, the key to go on by; "" for what is not worth it. Requests behind it may be sent without
 *              waiting, as everywhere.
 *
 * [sums]       SUMS -> SUM* END: checksums of a file, or of what the server holds of an upload, piece by piece from the
 *              start, so that the client can tell how far its own is the same. An id that is not known has no bytes.
 *
 * [change]     REMOVE, MOVE, MKDIR -> END with count 0, or ERROR. What is acknowledged is on disk.
 *
 * [list]       LIST -> ENTRIES* END. Paths are relative to the folder asked for; the order is the storage's own.
 * [stat]       STAT -> META, with offset 0.
 * [status]     STATUS -> INFO.
 * [quit]       QUIT -> END, then the server closes.
 *
 * [link]       Between a server and one that it has joined: LINK with {"kind": "join", ...} is the request, and if it is
 *              not answered with ERROR, LINK frames alone travel both ways from then on. What is in them is said at
 *              `FromMember` and `FromMaster` of link.ts. It takes a `replica` token or, where the server has no tokens,
 *              to be on the same machine.
 *
 * [wait]       WAIT may come before any answer, any number of times: it only says that the answer takes its time. It
 *              does not come while the server itself waits for content.
 *
 * [errors]     The table is `ERRORS` below. An ERROR ends its answer and the connection goes on, except for the codes
 *              marked `closes`. A server may send `busy`, `shutting_down` or `idle` unasked, and then closes.
 *
 * [paths]      Segments joined by "/", relative to the served folder, itself named "". Refused: an empty segment, "."
 *              and "..", NUL, CR, LF, a segment over 255 bytes, a path over 4,096. Everything else is a literal name.
 *
 * [etag]       Names one version of one file; opaque to the client, at most 255 bytes.
 *
 * [limits]     A frame to the server: HELLO 4,096 bytes of payload, others 65,536, DATA behind a PUT 524,288. A frame
 *              to the client: 524,288. A list frame is closed at 65,536. See `MAX_*` below.
 * ```
 */

export const PROTOCOL_VERSION = 1;
export const DEFAULT_PORT = 2121;
/** "RPRS". */
export const MAGIC = 0x52505253;
/** length u32, type u8, crc32 u32. */
export const HEADER_BYTES = 9;
/**
 * Content of one DATA frame. Measured on loopback, 2 GiB, whole client process, 2 cores with 1 MiB of cache each: 256 KiB
 * 0.76 s, 512 KiB 0.67 s, 1 MiB 0.71 s; below, the cost of each frame shows, above, the frame leaves the cache before its
 * checksum is taken. A sender uses less on a slow line, where a cut costs what is checked last.
 */
export const MAX_CONTENT_BYTES = 512 * 1024;
export const MAX_ANSWER_BYTES = MAX_CONTENT_BYTES;
export const MAX_REQUEST_BYTES = 64 * 1024;
/** Before a peer has said who it is. */
export const MAX_HELLO_BYTES = 4 * 1024;
export const MAX_TOKEN_BYTES = 255;
/** [sums] What one SUM stands for, the last one of a file perhaps for less. */
export const SUM_BYTES = 16 * 1024 * 1024;
/** Content of a FILE, and of a PUT that has it with it. */
export const MAX_WHOLE_BYTES = 56 * 1024;
export const MAX_PATH_BYTES = 4096;
export const MAX_SEGMENT_BYTES = 255;
export const MAX_ETAG_BYTES = 255;
export const MAX_TEXT_BYTES = 1024;
/** As a GET's `length`: everything from the offset on. */
export const TO_THE_END = Number.MAX_SAFE_INTEGER;
/** A flag of HELLO: FILE may come in place of META, DATA and END. */
export const TAKES_FILE = 1;
/** And: the server is to answer itself. */
export const DIRECT = 2;
/** As a PUT's `size`: the source tells when it ends. */
export const UNKNOWN_SIZE = Number.MAX_SAFE_INTEGER;

export const FrameType = {
  HELLO: 0x01,
  GET: 0x10,
  LIST: 0x11,
  STAT: 0x12,
  STATUS: 0x13,
  QUIT: 0x1f,
  PUT: 0x20,
  REMOVE: 0x21,
  MOVE: 0x22,
  MKDIR: 0x23,
  SUMS: 0x24,
  LINK: 0x30,
  WELCOME: 0x80,
  REDIRECT: 0x81,
  ERROR: 0x82,
  META: 0x83,
  DATA: 0x84,
  END: 0x85,
  ENTRIES: 0x86,
  INFO: 0x87,
  SUM: 0x88,
  WAIT: 0x89,
  FILE: 0x8a,
} as const;
export type FrameType = (typeof FrameType)[keyof typeof FrameType];

/** Process exit statuses of the client; 130 and 143 are those of SIGINT and SIGTERM. */
export const ExitStatus = {
  done: 0,
  usage: 2,
  notFound: 3,
  refused: 4,
  changed: 5,
  checksum: 6,
  local: 7,
  lost: 8,
  server: 9,
} as const;

/**
 * [errors] Everything that can go wrong, in one place. `text` is said when nothing more exact is known; `retry` tells
 * whether the same request may succeed a moment later; `closes` whether the connection ends with it. Numbers from 100
 * on never travel: they are the client's own.
 */
export const ERRORS = {
  not_found: { number: 1, text: "not found", retry: false, closes: false, exit: ExitStatus.notFound },
  bad_name: { number: 2, text: "not found: bad name", retry: false, closes: false, exit: ExitStatus.refused },
  not_a_file: { number: 3, text: "not a file", retry: false, closes: false, exit: ExitStatus.refused },
  not_a_folder: { number: 4, text: "not a folder", retry: false, closes: false, exit: ExitStatus.refused },
  refused: { number: 5, text: "refused", retry: false, closes: false, exit: ExitStatus.refused },
  changed: { number: 6, text: "changed on the server", retry: false, closes: false, exit: ExitStatus.changed },
  bad_range: { number: 7, text: "offset past the end", retry: false, closes: false, exit: ExitStatus.refused },
  failed: { number: 8, text: "the server could not read it", retry: true, closes: false, exit: ExitStatus.server },
  busy: { number: 9, text: "too many connections", retry: true, closes: true, exit: ExitStatus.server },
  shutting_down: { number: 10, text: "the server is stopping", retry: true, closes: true, exit: ExitStatus.server },
  idle: { number: 11, text: "closed for lack of activity", retry: true, closes: true, exit: ExitStatus.lost },
  version: { number: 12, text: "unknown protocol version", retry: false, closes: true, exit: ExitStatus.server },
  bad_frame: { number: 13, text: "not the reprise protocol", retry: false, closes: true, exit: ExitStatus.server },
  checksum: { number: 14, text: "damaged on the way", retry: true, closes: true, exit: ExitStatus.checksum },
  exists: { number: 15, text: "exists already", retry: false, closes: false, exit: ExitStatus.refused },
  no_room: { number: 16, text: "no room on the server", retry: false, closes: false, exit: ExitStatus.server },
  read_only: { number: 17, text: "the server is read-only", retry: false, closes: false, exit: ExitStatus.refused },
  in_use: { number: 18, text: "in use on the server", retry: true, closes: false, exit: ExitStatus.server },
  denied: { number: 19, text: "access denied", retry: false, closes: true, exit: ExitStatus.refused },
  too_large: { number: 20, text: "too large for the server", retry: false, closes: false, exit: ExitStatus.refused },
  usage: { number: 100, text: "usage", retry: false, closes: false, exit: ExitStatus.usage },
  local: { number: 102, text: "local file error", retry: false, closes: false, exit: ExitStatus.local },
  lost: { number: 103, text: "connection lost", retry: true, closes: true, exit: ExitStatus.lost },
  interrupted: { number: 104, text: "interrupted", retry: false, closes: true, exit: 130 },
  terminated: { number: 105, text: "terminated", retry: false, closes: true, exit: 143 },
  pipe_closed: { number: 106, text: "the output was closed", retry: false, closes: true, exit: ExitStatus.done },
  timeout: { number: 107, text: "no byte for too long", retry: true, closes: true, exit: ExitStatus.lost },
  insecure: { number: 108, text: "not secure", retry: false, closes: true, exit: ExitStatus.refused },
  speaks_tls: { number: 109, text: "TLS is spoken there", retry: false, closes: true, exit: ExitStatus.refused },
} as const satisfies Record<string, ErrorRow>;
export type ErrorCode = keyof typeof ERRORS;

interface ErrorRow {
  number: number;
  text: string;
  retry: boolean;
  closes: boolean;
  exit: number;
}

/** How a ClientHello begins, and how an alert of who expected one: the type of the record, then 3 for its version. */
const TLS_RECORDS = [0x1603, 0x1503];

const CODE_BY_NUMBER = new Map<number, ErrorCode>(
  Object.entries(ERRORS).map(([code, row]) => [row.number, code as ErrorCode]),
);

/** The one error of this project. `message` is for people: what happened, to what, what to do next. */
export class RepriseError extends Error {
  readonly code: ErrorCode;
  constructor(code: ErrorCode, message: string = ERRORS[code].text, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "RepriseError";
    this.code = code;
  }
}

export const EntryKind = { file: 1, folder: 2 } as const;
export type EntryKind = keyof typeof EntryKind;

/** What is known of one file or folder. A folder's size is 0 and its etag empty. */
export interface Meta {
  kind: EntryKind;
  /** Bytes. */
  size: number;
  /** Microseconds since 1970, possibly negative. */
  mtime: number;
  etag: string;
}

export interface Entry extends Omit<Meta, "etag"> {
  /** Relative to the folder that was listed. */
  path: string;
  /** Of a file, for who has asked for it; it does not travel. */
  etag?: string;
}

export type Request =
  | { action: "get"; path: string; offset: number; length: number; etag: string }
  | { action: "list"; path: string; recursive: boolean }
  | { action: "stat"; path: string }
  | { action: "status" }
  | { action: "quit" }
  | Put
  | { action: "remove"; path: string; recursive: boolean }
  | { action: "move"; path: string; to: string; overwrite: boolean }
  | { action: "mkdir"; path: string; parents: boolean }
  | { action: "sums"; id: string; path: string }
  | { action: "link"; message: Record<string, unknown> };

/** [put] What goes before an upload's content. */
export interface Put {
  action: "put";
  path: string;
  id: string;
  offset: number;
  /** Bytes of the whole, or UNKNOWN_SIZE. */
  size: number;
  /** Microseconds since 1970. */
  mtime: number;
  /** Only if nothing has the name yet. */
  noClobber: boolean;
  /** Makes the folders above it, where they are not there. */
  parents: boolean;
  /** Only in place of this version; "" for any. */
  etag: string;
  /** All of it, where it travels in the same frame. */
  content?: Uint8Array | undefined;
}

export interface Hello {
  version: number;
  flags: number;
  token: string;
}

/** [get] [put] What content travels in. */
export type Content = { type: "data"; crc32: number; content: Uint8Array } | { type: "end"; count: number };

export type Answer =
  | Content
  | { type: "welcome"; version: number; software: string }
  | { type: "redirect"; host: string; port: number; direct: boolean }
  | { type: "error"; error: RepriseError }
  | ({ type: "meta"; offset: number } & Meta)
  | { type: "wait" }
  | ({ type: "file"; content: Uint8Array } & Meta)
  | { type: "sum"; length: number; crc32: number }
  | { type: "entries"; entries: Entry[] }
  | { type: "info"; info: Record<string, unknown> }
  | { type: "link"; message: Record<string, unknown> };

export interface Frame {
  type: number;
  payload: Uint8Array;
  /** The header's, found to be right. */
  crc32: number;
}

// ---------------------------------------------------------------------------------------------------- [paths]

/**
 * Checks a path by [paths] and returns its segments; the served folder itself ("") has none.
 * Throws `bad_name`, in the words of "not found", so that a probe learns nothing.
 */
export function splitPath(path: string): string[] {
  if (path === "") return [];
  const segments = path.split("/");
  const bad = /[\0\r\n]/.test(path) || segments.some((name) => name === "" || name === "." || name === "..");
  if (bad) throw new RepriseError("bad_name", `not found: ${quote(path)} is not a name below the served folder`);
  if (utf8Length(path) > MAX_PATH_BYTES || segments.some((name) => utf8Length(name) > MAX_SEGMENT_BYTES)) {
    throw tooLong(path);
  }
  return segments;
}

function tooLong(path: string): RepriseError {
  return new RepriseError("bad_name", `not found: a name is at most 255 bytes and a path 4096: ${quote(path, 60)}`);
}

/** A name for a terminal or a message: quoted, control and bidirectional characters escaped, cut at `limit`. */
export function quote(text: string, limit = 300): string {
  return toJson(text.length > limit ? `${text.slice(0, limit)}…` : text);
}

/** JSON in one line that a terminal may be shown: control and bidirectional characters are escaped. */
export function toJson(value: unknown): string {
  return tame(JSON.stringify(value));
}

/** A text that somebody else wrote, in one line that a terminal may be shown. */
function tame(text: string): string {
  return text.replace(/[\p{Cc}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu, escapeUnit);
}

function escapeUnit(unit: string): string {
  return `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`;
}

// ---------------------------------------------------------------------------------------------------- encoding

const encoder = new TextEncoder();
const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const TWO_32 = 2 ** 32;

function utf8Length(text: string): number {
  return Buffer.byteLength(text, "utf8");
}

const LENGTH_BYTES = 4;
/** Length and type: what a frame's crc32 covers before the payload. */
const SUMMED_HEAD_BYTES = 5;

/** [frame] The crc32 that belongs into a frame's header. */
function sumOf(frame: Uint8Array): number {
  const head = Bun.hash.crc32(frame.subarray(0, SUMMED_HEAD_BYTES));
  return Bun.hash.crc32(frame.subarray(HEADER_BYTES), head);
}

/** Where a frame is put together before it is known how long it gets: a new place for each costs more than all the rest. */
let scratch = new Uint8Array(64 * 1024);
let scratchView = new DataView(scratch.buffer);

/** [frame] Writes one frame's fields in order, one frame at a time. Length and crc32 are filled in by `done`. */
class Writer {
  #bytes = scratch;
  #view = scratchView;
  #end: number = HEADER_BYTES;
  readonly #type: FrameType;

  /** `own`: the place is its own, for a frame that is written in several goes. */
  constructor(type: FrameType, own?: Uint8Array<ArrayBuffer>) {
    this.#type = type;
    if (!own) return;
    this.#bytes = own;
    this.#view = new DataView(own.buffer);
  }
  /** Bytes of payload so far. */
  get length(): number {
    return this.#end - HEADER_BYTES;
  }
  u8(value: number): this {
    const at = this.#take(1);
    this.#view.setUint8(at, value);
    return this;
  }
  u16(value: number): this {
    const at = this.#take(2);
    this.#view.setUint16(at, value);
    return this;
  }
  u32(value: number): this {
    const at = this.#take(4);
    this.#view.setUint32(at, value);
    return this;
  }
  u64(value: number): this {
    if (!(value >= 0)) throw new RangeError(`Not a u64: ${value}`);
    return this.i64(value);
  }
  i64(value: number): this {
    if (!Number.isSafeInteger(value)) throw new RangeError(`Not a safe integer: ${value}`);
    const at = this.#take(8);
    this.#view.setInt32(at, Math.floor(value / TWO_32));
    this.#view.setUint32(at + 4, value >>> 0);
    return this;
  }
  /** flags u8 of which only the lowest is in use. */
  flag(value: boolean): this {
    return this.u8(value ? 1 : 0);
  }
  str(text: string, limit = MAX_PATH_BYTES): this {
    const bytes = encoder.encode(text);
    if (bytes.length > limit) throw new RangeError(`A string of ${bytes.length} bytes, at most ${limit} fit here`);
    return this.u16(bytes.length).raw(bytes);
  }
  /** What a user may have typed. Throws `bad_name` where it is too long to be asked for. */
  path(text: string): this {
    if (utf8Length(text) > MAX_PATH_BYTES) throw tooLong(text);
    return this.str(text);
  }
  raw(bytes: Uint8Array): this {
    const at = this.#take(bytes.length);
    this.#bytes.set(bytes, at);
    return this;
  }
  done(): Uint8Array {
    this.#view.setUint32(0, this.length);
    this.#bytes[LENGTH_BYTES] = this.#type;
    this.#view.setUint32(SUMMED_HEAD_BYTES, sumOf(this.#bytes.subarray(0, this.#end)));
    return this.#bytes.slice(0, this.#end);
  }
  /** Makes room. May move everything, so `#bytes` and `#view` are looked at afterwards. */
  #take(count: number): number {
    const at = this.#end;
    this.#end += count;
    if (this.#end > this.#bytes.length) {
      const larger = new Uint8Array(Math.max(this.#end, this.#bytes.length * 2));
      larger.set(this.#bytes);
      if (this.#bytes === scratch) scratch = larger;
      this.#bytes = larger;
      this.#view = new DataView(larger.buffer);
      if (scratch === larger) scratchView = this.#view;
    }
    return at;
  }
}

/** [handshake] magic u32, version u16, flags u32, token str. */
export function encodeHello(hello: Partial<Hello> = {}): Uint8Array {
  const { version = PROTOCOL_VERSION, flags = 0, token = "" } = hello;
  return new Writer(FrameType.HELLO).u32(MAGIC).u16(version).u32(flags).str(token).done();
}

/** [get] [list] [stat] [status] [quit] [put] [change] [sums] [link] */
export function encodeRequest(request: Request): Uint8Array {
  switch (request.action) {
    case "get": {
      const { offset, length, etag, path } = request;
      return new Writer(FrameType.GET).u64(offset).u64(length).str(etag, MAX_ETAG_BYTES).path(path).done();
    }
    case "list":
      return new Writer(FrameType.LIST).flag(request.recursive).path(request.path).done();
    case "stat":
      return new Writer(FrameType.STAT).path(request.path).done();
    case "status":
      return new Writer(FrameType.STATUS).done();
    case "quit":
      return new Writer(FrameType.QUIT).done();
    case "put":
      return encodePut(request);
    case "remove":
      return new Writer(FrameType.REMOVE).flag(request.recursive).path(request.path).done();
    case "move":
      return new Writer(FrameType.MOVE).flag(request.overwrite).path(request.path).path(request.to).done();
    case "mkdir":
      return new Writer(FrameType.MKDIR).flag(request.parents).path(request.path).done();
    case "sums":
      return new Writer(FrameType.SUMS).str(request.id).path(request.path).done();
    case "link":
      return encodeLink(request.message);
  }
}

/** [link] A JSON object, of MAX_REQUEST_BYTES at the most. */
export function encodeLink(message: object): Uint8Array {
  return encodeLinkText(JSON.stringify(message));
}

/** [link] The same of what is JSON already. */
export function encodeLinkText(text: string): Uint8Array {
  return new Writer(FrameType.LINK).raw(encoder.encode(text)).done();
}

/** [put] offset u64, size u64, mtime i64, flags u8, id str, etag str, path str, content. */
function encodePut(put: Put): Uint8Array {
  const frame = putFields(put);
  return (put.content ? frame.raw(put.content) : frame).done();
}

function putFields({ offset, size, mtime, noClobber, parents, id, etag, path, content }: Put): Writer {
  const flags = (noClobber ? PUT_NO_CLOBBER : 0) | (content ? PUT_WITH_CONTENT : 0) | (parents ? PUT_PARENTS : 0);
  const frame = new Writer(FrameType.PUT).u64(offset).u64(size).i64(mtime).u8(flags);
  return frame.str(id).str(etag, MAX_ETAG_BYTES).path(path);
}

const PUT_NO_CLOBBER = 1;
const PUT_WITH_CONTENT = 2;
const PUT_PARENTS = 4;

/** [handshake] version u16, software str. */
export function encodeWelcome(software: string): Uint8Array {
  return new Writer(FrameType.WELCOME).u16(PROTOCOL_VERSION).str(software, MAX_TEXT_BYTES).done();
}

/** [redirect] port u16, flags u8, host str. */
export function encodeRedirect(host: string, port: number, direct = false): Uint8Array {
  return new Writer(FrameType.REDIRECT).u16(port).u8(Number(direct)).str(host, MAX_TEXT_BYTES).done();
}

/** [errors] code u16, text str. A text over the limit is cut, never refused: an error must always travel. */
export function encodeError(error: RepriseError): Uint8Array {
  const text = utf8Length(error.message) > MAX_TEXT_BYTES ? error.message.slice(0, MAX_TEXT_BYTES / 4) : error.message;
  return new Writer(FrameType.ERROR).u16(ERRORS[error.code].number).str(text, MAX_TEXT_BYTES).done();
}

/** [get] [stat] [put] kind u8, size u64, mtime i64, offset u64, etag str. */
export function encodeMeta(meta: Meta, offset = 0): Uint8Array {
  const frame = new Writer(FrameType.META).u8(EntryKind[meta.kind]).u64(meta.size).i64(meta.mtime).u64(offset);
  return frame.str(meta.etag, MAX_ETAG_BYTES).done();
}

/** [get] kind u8, size u64, mtime i64, etag str, and all of the content. */
export function encodeFile(meta: Meta, content: Uint8Array): Uint8Array {
  const frame = new Writer(FrameType.FILE).u8(EntryKind[meta.kind]).u64(meta.size).i64(meta.mtime);
  return frame.str(meta.etag, MAX_ETAG_BYTES).raw(content).done();
}

/** [get] [put] What goes before `length` bytes of content, whose crc32 is `contentSum`; written to `into`, where given. */
export function encodeDataHeader(length: number, contentSum: number, into?: Uint8Array): Uint8Array {
  const bytes = into?.subarray(0, HEADER_BYTES) ?? new Uint8Array(HEADER_BYTES);
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  view.setUint32(0, length);
  bytes[4] = FrameType.DATA;
  const head = Bun.hash.crc32(bytes.subarray(0, SUMMED_HEAD_BYTES));
  view.setUint32(SUMMED_HEAD_BYTES, crc32Combine(head, contentSum, length));
  return bytes;
}

/** The inverse: the crc32 of the content alone. */
function contentSumOf({ payload, crc32 }: Frame): number {
  const without = encodeDataHeader(payload.length, 0);
  return (crc32 ^ new DataView(without.buffer).getUint32(SUMMED_HEAD_BYTES)) >>> 0;
}

/** [get] [list] [quit] [put] [change] [sums] count u64. */
export function encodeEnd(count: number): Uint8Array {
  return new Writer(FrameType.END).u64(count).done();
}

/** [sums] length u64, crc32 u32. */
export function encodeSum(length: number, crc32: number): Uint8Array {
  return new Writer(FrameType.SUM).u64(length).u32(crc32).done();
}

/** [wait] */
export function encodeWait(): Uint8Array {
  return new Writer(FrameType.WAIT).done();
}

/** [status] A JSON object. */
export function encodeInfo(info: Record<string, unknown>): Uint8Array {
  return new Writer(FrameType.INFO).raw(encoder.encode(JSON.stringify(info))).done();
}

/** [list] Collects entries into ENTRIES frames: `add` returns a frame when one is full, `rest` what is left. */
export class EntriesEncoder {
  #frame: Writer | undefined;

  /** Appends kind u8, size u64, mtime i64, path str. */
  add(entry: Entry): Uint8Array | undefined {
    this.#frame ??= new Writer(FrameType.ENTRIES, new Uint8Array(MAX_REQUEST_BYTES));
    this.#frame.u8(EntryKind[entry.kind]).u64(entry.size).i64(entry.mtime).str(entry.path);
    return this.#frame.length > MAX_REQUEST_BYTES - MAX_PATH_BYTES - 32 ? this.rest() : undefined;
  }
  rest(): Uint8Array | undefined {
    const frame = this.#frame?.done();
    this.#frame = undefined;
    return frame;
  }
}

// ---------------------------------------------------------------------------------------------------- decoding

/** [frame] Reads one payload's fields in order; every read is checked against the payload's end. */
class Reader {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  #at = 0;

  constructor(payload: Uint8Array) {
    this.#bytes = payload;
    this.#view = new DataView(payload.buffer, payload.byteOffset, payload.byteLength);
  }
  get atEnd(): boolean {
    return this.#at === this.#bytes.length;
  }
  u8(): number {
    return this.#view.getUint8(this.#take(1));
  }
  u16(): number {
    return this.#view.getUint16(this.#take(2));
  }
  u32(): number {
    return this.#view.getUint32(this.#take(4));
  }
  u64(): number {
    const value = this.i64();
    if (value < 0) throw badFrame("a number over 2^53-1");
    return value;
  }
  i64(): number {
    const at = this.#take(8);
    const value = this.#view.getInt32(at) * TWO_32 + this.#view.getUint32(at + 4);
    if (!Number.isSafeInteger(value)) throw badFrame("a number over 2^53-1");
    return value;
  }
  flag(): boolean {
    return (this.u8() & 1) === 1;
  }
  str(limit = MAX_PATH_BYTES): string {
    const length = this.u16();
    if (length > limit) throw badFrame(`a string of ${length} bytes where ${limit} are allowed`);
    const at = this.#take(length);
    return decodeText(this.#bytes.subarray(at, at + length));
  }
  rest(): Uint8Array {
    const at = this.#at;
    this.#at = this.#bytes.length;
    return this.#bytes.subarray(at);
  }
  kind(): EntryKind {
    const number = this.u8();
    if (number === EntryKind.file) return "file";
    if (number === EntryKind.folder) return "folder";
    throw badFrame(`an entry of kind ${number}`);
  }
  end(): void {
    if (!this.atEnd) throw badFrame("bytes left over in a frame");
  }
  #take(count: number): number {
    const at = this.#at;
    if (at + count > this.#bytes.length) throw badFrame("a frame that ends early");
    this.#at += count;
    return at;
  }
}

function badFrame(what: string): RepriseError {
  return new RepriseError("bad_frame", `not the reprise protocol: ${what}`);
}

function decodeText(bytes: Uint8Array): string {
  try {
    return decoder.decode(bytes);
  } catch (cause) {
    throw new RepriseError("bad_frame", "not the reprise protocol: a text that is not UTF-8", cause);
  }
}

/** [handshake] Throws `bad_frame` for anything that is not a HELLO; the version is the caller's to judge. */
export function decodeHello(frame: Frame): Hello {
  if (frame.type !== FrameType.HELLO) throw badFrame("a connection that does not open with HELLO");
  const reader = new Reader(frame.payload);
  if (reader.u32() !== MAGIC) throw badFrame("a HELLO without its magic");
  const version = reader.u16();
  // A later version may add fields: only ours is held to its exact layout.
  if (version !== PROTOCOL_VERSION) return { version, flags: 0, token: "" };
  const hello = { version, flags: reader.u32(), token: reader.str(MAX_TOKEN_BYTES) };
  reader.end();
  return hello;
}

/** [get] [list] [stat] [status] [quit] [put] [change] [sums] [link] Throws `bad_frame`. Paths are not checked here: see `splitPath`. */
export function decodeRequest(frame: Frame): Request {
  const reader = new Reader(frame.payload);
  const request = readRequest(frame.type, reader);
  reader.end();
  return request;
}

function readRequest(type: number, reader: Reader): Request {
  switch (type) {
    case FrameType.GET:
      return {
        action: "get",
        offset: reader.u64(),
        length: reader.u64(),
        etag: reader.str(MAX_ETAG_BYTES),
        path: reader.str(),
      };
    case FrameType.LIST:
      return { action: "list", recursive: reader.flag(), path: reader.str() };
    case FrameType.STAT:
      return { action: "stat", path: reader.str() };
    case FrameType.STATUS:
      return { action: "status" };
    case FrameType.QUIT:
      return { action: "quit" };
    case FrameType.PUT:
      return readPut(reader);
    case FrameType.REMOVE:
      return { action: "remove", recursive: reader.flag(), path: reader.str() };
    case FrameType.MOVE:
      return { action: "move", overwrite: reader.flag(), path: reader.str(), to: reader.str() };
    case FrameType.MKDIR:
      return { action: "mkdir", parents: reader.flag(), path: reader.str() };
    case FrameType.SUMS:
      return { action: "sums", id: reader.str(), path: reader.str() };
    case FrameType.LINK:
      return { action: "link", message: readObject(reader, "a LINK") };
    default:
      throw badFrame(`a request of type 0x${type.toString(16)}`);
  }
}

function readPut(reader: Reader): Put {
  const [offset, size, mtime, flags] = [reader.u64(), reader.u64(), reader.i64(), reader.u8()];
  const [id, etag, path] = [reader.str(), reader.str(MAX_ETAG_BYTES), reader.str()];
  const content = flags & PUT_WITH_CONTENT ? reader.rest() : undefined;
  if (content && (offset !== 0 || content.length !== size)) throw badFrame("a PUT with other content than it says");
  const [noClobber, parents] = [(flags & PUT_NO_CLOBBER) !== 0, (flags & PUT_PARENTS) !== 0];
  return { action: "put", offset, size, mtime, noClobber, parents, id, etag, path, content };
}

/** [put] A frame behind PUT. Throws `bad_frame`. Content is the payload itself, not a copy. */
export function decodeContent(frame: Frame): Content {
  if (frame.type === FrameType.DATA) return dataOf(frame);
  if (frame.type !== FrameType.END) throw badFrame(`type 0x${frame.type.toString(16)} in the middle of an upload`);
  const reader = new Reader(frame.payload);
  const count = reader.u64();
  reader.end();
  return { type: "end", count };
}

/** Any frame to the client. Throws `bad_frame`. A `data` answer's content is the payload itself, not a copy. */
export function decodeAnswer(frame: Frame): Answer {
  if (frame.type === FrameType.DATA) return dataOf(frame);
  const reader = new Reader(frame.payload);
  const answer = readAnswer(frame.type, reader);
  reader.end();
  return answer;
}

function dataOf(frame: Frame): Content {
  if (frame.payload.length === 0) throw badFrame("a DATA frame without content");
  return { type: "data", content: frame.payload, crc32: contentSumOf(frame) };
}

function readAnswer(type: number, reader: Reader): Answer {
  switch (type) {
    case FrameType.META: {
      const meta = { type: "meta", kind: reader.kind(), size: reader.u64(), mtime: reader.i64() } as const;
      return { ...meta, offset: reader.u64(), etag: reader.str(MAX_ETAG_BYTES) };
    }
    case FrameType.END:
      return { type: "end", count: reader.u64() };
    case FrameType.FILE: {
      const meta = { kind: reader.kind(), size: reader.u64(), mtime: reader.i64(), etag: reader.str(MAX_ETAG_BYTES) };
      const content = reader.rest();
      if (content.length !== meta.size) throw badFrame("a FILE with other content than it says");
      return { type: "file", ...meta, content };
    }
    case FrameType.WAIT:
      return { type: "wait" };
    case FrameType.SUM:
      return { type: "sum", length: reader.u64(), crc32: reader.u32() };
    case FrameType.ERROR:
      return { type: "error", error: readError(reader) };
    case FrameType.WELCOME:
      return { type: "welcome", version: reader.u16(), software: reader.str(MAX_TEXT_BYTES) };
    case FrameType.REDIRECT:
      return { type: "redirect", ...readAddress(reader) };
    case FrameType.ENTRIES:
      return { type: "entries", entries: readEntries(reader) };
    case FrameType.INFO:
      return { type: "info", info: readObject(reader, "an INFO") };
    case FrameType.LINK:
      return { type: "link", message: readObject(reader, "a LINK") };
    default:
      throw badFrame(`an answer of type 0x${type.toString(16)}`);
  }
}

/** Where to connect is looked at before anybody does, or is told of it. */
function readAddress(reader: Reader): { port: number; direct: boolean; host: string } {
  const [port, flags, host] = [reader.u16(), reader.u8(), reader.str(MAX_TEXT_BYTES)];
  if (port === 0 || !/^[\w.:%-]+$/.test(host)) throw badFrame("a REDIRECT to what is no address");
  return { port, direct: (flags & 1) !== 0, host };
}

function readError(reader: Reader): RepriseError {
  const number = reader.u16();
  const text = tame(reader.str(MAX_TEXT_BYTES));
  const code = number < 100 ? CODE_BY_NUMBER.get(number) : undefined;
  // A code from a later version: what it says still counts.
  return code ? new RepriseError(code, text) : new RepriseError("failed", `${text} (unknown error ${number})`);
}

function readEntries(reader: Reader): Entry[] {
  const entries: Entry[] = [];
  while (!reader.atEnd) {
    entries.push({ kind: reader.kind(), size: reader.u64(), mtime: reader.i64(), path: reader.str() });
  }
  return entries;
}

function readObject(reader: Reader, what: string): Record<string, unknown> {
  const text = decodeText(reader.rest());
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === "object" && value !== null && !Array.isArray(value)) return { ...value };
  } catch (cause) {
    throw new RepriseError("bad_frame", `not the reprise protocol: ${what} that is not JSON`, cause);
  }
  throw badFrame(`${what} that is not an object`);
}

// ---------------------------------------------------------------------------------------------------- [frame]

/**
 * Buffers of one size that are used again. The one given back last is lent first: it is still in the processor's cache,
 * which is worth a sixth of the throughput against taking turns.
 */
export class BufferPool {
  /** Of each buffer. */
  readonly bytes: number;
  readonly #free: ArrayBuffer[] = [];
  readonly #lent = new WeakSet<ArrayBufferLike>();

  constructor(bytes: number) {
    this.bytes = bytes;
  }

  /** At least `length` bytes, of any content; undefined if that is more than a buffer has. */
  take(length: number): Uint8Array | undefined {
    if (length > this.bytes) return undefined;
    const buffer = this.#free.pop() ?? new ArrayBuffer(this.bytes);
    this.#lent.add(buffer);
    return new Uint8Array(buffer, 0, length);
  }

  /** Gives back the buffer behind `view`, which nobody may use from now on. Other memory is left to the collector. */
  give(view: Uint8Array): void {
    if (this.#lent.delete(view.buffer)) this.#free.push(view.buffer as ArrayBuffer);
  }
}

/** In place of memory that a decoder has no use for: thousands of connections wait between two frames. */
const NOTHING: Uint8Array = new Uint8Array(0);

/**
 * Cuts a stream of bytes into frames. Bytes come in by `push(chunk)`, or are received straight into `space()` and
 * announced by `filled(count)`; `next()` gives the frames, checked. One rule: a length is looked at before anything is
 * allocated for it, and after a bad frame the decoder stays failed.
 *
 * A frame that lies whole in a pushed chunk is a view of it; a split one is put together in a buffer of its own, which
 * comes from `pool`, if there is one, for large frames (DATA): whoever has taken such a frame may give it back.
 */
export class FrameDecoder {
  /** Longest payload to accept from now on, in bytes. */
  maxLength: number;
  readonly #pool: BufferPool | undefined;
  /** What was pushed and not yet taken. */
  #chunk = NOTHING;
  #at = 0;
  /** The frame being put together, header included, and as many bytes of slack as its successor's header has. */
  #partial = NOTHING;
  #have = 0;
  #failure: RepriseError | undefined;

  constructor(options: { maxLength: number; pool?: BufferPool | undefined }) {
    this.maxLength = options.maxLength;
    this.#pool = options.pool;
  }

  /** Takes a chunk, which must not change afterwards. The one before must have been used up by `next()`. */
  push(chunk: Uint8Array): void {
    if (this.#at < this.#chunk.length) throw new Error("push() before next() returned undefined");
    this.#chunk = chunk;
    this.#at = 0;
  }

  /** The next whole frame, or undefined when more bytes are needed. Throws `bad_frame`, or `checksum` for damage. */
  next(): Frame | undefined {
    if (this.#failure) throw this.#failure;
    return this.#have > 0 ? this.#nextSplit() : this.#nextWhole();
  }

  /** Where to receive next. Only valid when `next()` has returned undefined, and until it is called again. */
  space(): Uint8Array {
    this.#begin();
    return this.#partial.subarray(this.#have);
  }

  /** How much of the frame being put together is still to come, as far as that is known; a frame not begun has none. */
  get due(): number {
    return this.#partial.length - this.#have;
  }

  /** `count` bytes were received into `space()`. */
  filled(count: number): void {
    this.#have += count;
  }

  /** Lets go of all that was pushed, for good: no frame follows. */
  discard(): void {
    this.#fail(new RepriseError("lost"));
  }

  /** Whether the stream may end here without having cut a frame. */
  get atBoundary(): boolean {
    return this.#have === 0 && this.#at === this.#chunk.length;
  }

  #nextWhole(): Frame | undefined {
    const left = this.#chunk.length - this.#at;
    if (left >= HEADER_BYTES) {
      const end = this.#at + HEADER_BYTES + this.#lengthAt(this.#chunk, this.#at);
      if (end <= this.#chunk.length) {
        const frame = this.#frameOf(this.#chunk.subarray(this.#at, end));
        this.#at = end;
        return frame;
      }
    }
    if (left === 0) {
      // Lets go of the chunk: a decoder at rest pins nothing. An empty view of it would.
      this.#chunk = NOTHING;
      this.#at = 0;
      return undefined;
    }
    return this.#nextSplit();
  }

  #nextSplit(): Frame | undefined {
    this.#begin();
    this.#take(HEADER_BYTES);
    if (this.#have < LENGTH_BYTES) return undefined;
    const end = HEADER_BYTES + this.#lengthAt(this.#partial, 0);
    if (this.#have < HEADER_BYTES) return undefined;
    this.#grow(end);
    this.#take(end);
    if (this.#have < end) return undefined;
    const frame = this.#frameOf(this.#partial.subarray(0, end));
    this.#carry(end);
    return frame;
  }

  #begin(): void {
    if (this.#partial.length === 0) this.#partial = new Uint8Array(2 * HEADER_BYTES);
  }

  /** Copies from the chunk until the partial frame has `target` bytes. */
  #take(target: number): void {
    const count = Math.min(target - this.#have, this.#chunk.length - this.#at);
    if (count <= 0) return;
    this.#partial.set(this.#chunk.subarray(this.#at, this.#at + count), this.#have);
    this.#have += count;
    this.#at += count;
  }

  #grow(end: number): void {
    if (this.#partial.length >= end) return;
    const larger = this.#allocate(end + HEADER_BYTES);
    larger.set(this.#partial.subarray(0, this.#have));
    this.#partial = larger;
  }

  /** Starts the next frame with the bytes of it that `space()` let in behind this one. */
  #carry(end: number): void {
    const rest = this.#partial.subarray(end, this.#have);
    this.#partial = NOTHING;
    this.#have = rest.length;
    if (rest.length === 0) return;
    this.#begin();
    this.#partial.set(rest);
  }

  #allocate(bytes: number): Uint8Array {
    const large = this.#pool && bytes > this.#pool.bytes / 4 ? this.#pool.take(bytes) : undefined;
    return large ?? new Uint8Array(bytes);
  }

  #lengthAt(bytes: Uint8Array, at: number): number {
    const length = u32At(bytes, at);
    if (length <= this.maxLength) return length;
    if (TLS_RECORDS.includes(length >>> 16)) throw this.#fail(new RepriseError("speaks_tls"));
    throw this.#fail(badFrame(`a frame of ${length} bytes where ${this.maxLength} are allowed`));
  }

  #frameOf(bytes: Uint8Array): Frame {
    const crc32 = u32At(bytes, SUMMED_HEAD_BYTES);
    if (sumOf(bytes) !== crc32) throw this.#fail(new RepriseError("checksum"));
    return { type: bytes[4]!, payload: bytes.subarray(HEADER_BYTES), crc32 };
  }

  #fail(error: RepriseError): RepriseError {
    this.#failure = error;
    this.#chunk = this.#partial = NOTHING;
    this.#at = this.#have = 0;
    return error;
  }
}

function u32At(bytes: Uint8Array, at: number): number {
  return ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0;
}

// ---------------------------------------------------------------------------------------------------- crc32

/**
 * The crc32 of A followed by B, from the crc32 of each and the length of B. A crc is a remainder modulo a polynomial
 * over GF(2), so appending B multiplies A's remainder by x^(8·length). The source of the rule is zlib's crc32_combine.
 */
export function crc32Combine(crcA: number, crcB: number, lengthB: number): number {
  return (multiply(powerOfX(lengthB), crcA) ^ crcB) >>> 0;
}

/** Polynomials are kept reflected, as crc32 keeps them: the top bit is x^0. */
const CRC32_POLYNOMIAL = 0xedb88320;

function multiply(a: number, b: number): number {
  let product = 0;
  for (let bit = 1 << 31; bit !== 0; bit >>>= 1) {
    if (a & bit) product ^= b;
    b = b & 1 ? (b >>> 1) ^ CRC32_POLYNOMIAL : b >>> 1;
  }
  return product;
}

/** x^(8·bytes) by repeated squaring; the last result is kept, because all DATA frames but one are of one length. */
let lastPower = { bytes: 0, value: 1 << 31 };
function powerOfX(bytes: number): number {
  if (lastPower.bytes === bytes) return lastPower.value;
  let value = 1 << 31;
  let square = 1 << 23; // x^8
  for (let rest = bytes; rest > 0; rest = Math.floor(rest / 2)) {
    if (rest % 2 === 1) value = multiply(square, value);
    square = multiply(square, square);
  }
  lastPower = { bytes, value };
  return value;
}

"""
The bytes inside a .zst. (The reader that the package zstandard brings does not say when a file is cut off.)
"""
import io


class ZstdFile(io.RawIOBase):
    """The bytes inside a .zst. (The reader that zstandard brings does not say when a file is cut off.)"""

    def __init__(self, raw):
        import zstandard
        self.raw = raw
        self.new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self.frame = None     # a file is one frame after another; None between them
        self.packed = b""     # read from the file, not unpacked yet
        self.unpacked = b""   # not handed out yet

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.unpacked:
            self.packed = self.packed or self.raw.read(1 << 14)
            if not self.packed:
                if self.frame:
                    raise EOFError("the last frame does not end")
                return 0
            self.frame = self.frame or self.new_frame()
            self.unpacked = self.frame.decompress(self.packed)
            self.packed = b""
            if self.frame.eof:
                self.packed = self.frame.unused_data
                self.frame = None
        size = min(len(buffer), len(self.unpacked))
        buffer[:size] = self.unpacked[:size]
        self.unpacked = self.unpacked[size:]
        return size

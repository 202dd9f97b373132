-- Holds back what comes of a body beyond GATEWAY_MAX_BODY_BYTES. One that does not say how large it is gets a 413 of the
-- service as soon as that has read so much; until then Serve would keep all that comes.

local ROOM_BYTES = 1024 * 1024 -- the service sees that it is too much
local limit_bytes = tonumber(os.getenv("GATEWAY_MAX_BODY_BYTES")) + ROOM_BYTES

local BodyLimit = { id = "body-limit", flags = filter.FLT_CFG_FL_HTX }
BodyLimit.__index = BodyLimit

function BodyLimit:new()
    return setmetatable({ seen_bytes = 0 }, BodyLimit)
end

function BodyLimit:start_analyze(_, channel)
    if not channel:is_resp() then
        filter.register_data_filter(self, channel)
    end
end

function BodyLimit:http_payload(_, message)
    self.seen_bytes = self.seen_bytes + message:input()
    if self.seen_bytes > limit_bytes then
        return 0
    end
end

core.register_filter("body-limit", BodyLimit, function(body_limit)
    return body_limit
end)
